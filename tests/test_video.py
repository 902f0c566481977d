"""Videos: decoding, views, and their averaged scores."""

import pytest
import torch
from PIL import Image
from torch import nn

import papr_fx
from papr_fx.video import average_views, read_video, sample_frames, sample_views, write_video

from .labelled_clips import moving_square


def test_a_video_comes_back(tmp_path):
    path = tmp_path / "clip.mp4"
    video = moving_square()
    write_video(path, video)
    found = read_video(path)
    assert found.dtype == torch.uint8
    assert found.shape == (24, 3, 50, 70)
    assert (found / 255 - video).abs().mean() < 0.02  # H.264 is lossy
    write_video(path, video[..., :49, :69])
    assert read_video(path).shape == (24, 3, 48, 68)


def test_bytes_are_not_written(tmp_path):
    with pytest.raises(papr_fx.ArgumentError, match="divide bytes by 255"):
        write_video(tmp_path / "clip.mp4", torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_grey_videos_become_rgb(tmp_path):
    import av

    path = tmp_path / "grey.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "gray"
        for level in range(5):
            pixels = torch.full((32, 48), 50 * level, dtype=torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="gray")))
        container.mux(stream.encode())
    found = read_video(path)
    assert found.shape == (5, 3, 32, 48)
    assert [int(frame.float().mean().round()) for frame in found] == pytest.approx([0, 50, 100, 150, 200], abs=1)


def test_frames_of_several_sizes_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    write_video(path, moving_square())
    sizes = iter(range(40, 100))
    monkeypatch.setattr("papr_fx.video_file.torch.from_numpy", lambda pixels: torch.zeros(next(sizes), 4, 3, dtype=torch.uint8))
    with pytest.raises(papr_fx.ArgumentError, match="its frames differ in size"):
        read_video(path)


def write_frames(path, frames, prepare=lambda stream: None, codec="libx264rgb", pix_fmt="rgb24"):
    """Writes frames (T, H, W, C) uint8 without loss."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"qp": "0"} if "264" in codec else {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        prepare(stream)
        for frame in frames:
            format = "rgba" if frames.shape[-1] == 4 else "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format=format).reformat(format=pix_fmt)))
        container.mux(stream.encode())


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", ["", "hflip", "vflip"])
def test_videos_are_turned_as_they_are_to_be_shown(angle, mirrored, tmp_path):
    """Phones store every video lying, and say by how much it is to be turned."""
    stored = torch.randint(256, (3, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flips = {mirrored: True} if mirrored else {}
    write_frames(tmp_path / "phone.mp4", stored, lambda stream: stream.set_display_rotation(angle, **flips))
    shown = torch.rot90(stored, angle // 90, (1, 2))
    if mirrored:
        shown = shown.flip(2 if mirrored == "hflip" else 1)
    assert torch.equal(read_video(tmp_path / "phone.mp4"), shown.permute(0, 3, 1, 2))


def test_other_angles_are_refused(tmp_path):
    path = tmp_path / "tilted.mp4"
    write_frames(path, torch.zeros(2, 16, 24, 3, dtype=torch.uint8), lambda stream: stream.set_display_rotation(30))
    with pytest.raises(papr_fx.ArgumentError, match=f"cannot read a clip from {path}: .*no multiple of 90 degrees"):
        read_video(path)


def test_transparent_pixels_of_a_video_are_white(tmp_path):
    pixels = torch.full((2, 16, 24, 4), 255, dtype=torch.uint8)
    pixels[:, 4:12, 4:12] = torch.tensor([10, 20, 30, 0], dtype=torch.uint8)
    write_frames(tmp_path / "clear.mov", pixels, codec="qtrle", pix_fmt="argb")
    assert (read_video(tmp_path / "clear.mov") == 255).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "avif"])
def test_animations(suffix, tmp_path):
    """FFmpeg reads no frame of an animated WebP file, and one of an animated AVIF file."""
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (64, 48), (level, 0, 0)) for level in (250, 100, 0, 50)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    found = read_video(path)
    assert found.shape == (4, 3, 48, 64)
    assert found[:, 0, 0, 0].tolist() == pytest.approx([250, 100, 0, 50], abs=4)
    with path.open("rb") as source:
        assert torch.equal(read_video(source, frames=2), found[[0, 3]])
    with pytest.raises(papr_fx.ArgumentError, match="the clip has 4 frames, too few"):
        read_video(path, frames=5)


@pytest.mark.parametrize("frames", [1, 4, 24])
def test_a_number_of_frames_is_that_of_the_whole_video(frames, tmp_path):
    write_video(tmp_path / "clip.mp4", moving_square())
    whole = read_video(tmp_path / "clip.mp4")
    assert torch.equal(read_video(tmp_path / "clip.mp4", frames=frames), sample_frames(whole, frames))
    with (tmp_path / "clip.mp4").open("rb") as source:
        assert torch.equal(read_video(source, frames=lambda count: [count - 1, 2, 2]), whole[[23, 2, 2]])


def test_frames_that_a_video_does_not_hold(tmp_path):
    write_video(tmp_path / "clip.mp4", moving_square())
    for frames, message in (
        (25, "the clip has 24 frames, too few: the model takes 25"),
        (0, "frames must be at least 1, not 0"),
        (lambda count: [count], "indices from 0 to 23"),
        (lambda count: [], "at least one frame"),
    ):
        with pytest.raises(papr_fx.ArgumentError, match=message):
            read_video(tmp_path / "clip.mp4", frames=frames)


@pytest.mark.parametrize("packets", [3, 60])
def test_frames_are_counted_where_packets_say_another_number(packets, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", moving_square())
    whole = read_video(tmp_path / "clip.mp4")
    monkeypatch.setattr("papr_fx.video_file._packets", lambda path: packets)
    assert torch.equal(read_video(tmp_path / "clip.mp4"), whole)
    assert torch.equal(read_video(tmp_path / "clip.mp4", frames=8), sample_frames(whole, 8))


def test_only_the_frames_in_use_become_pixels(tmp_path, monkeypatch):
    import papr_fx.video_file as video

    write_video(tmp_path / "clip.mp4", moving_square(200))
    shown = []
    monkeypatch.setattr(video, "_shown", lambda frame, show=video._shown: shown.append(frame.pts) or show(frame))
    assert len(read_video(tmp_path / "clip.mp4", frames=5)) == 5
    assert len(shown) == 5


def sound_only(path):
    import av

    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 800, dtype=torch.int16).numpy(), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.touch(),
        lambda path: path.write_bytes(bytes(range(256)) * 20),
        lambda path: path.mkdir(),
        sound_only,
    ],
    ids=["missing", "empty", "corrupt", "folder", "sound only"],
)
def test_files_that_hold_no_video(write, tmp_path):
    path = tmp_path / "clip.mp4"
    write(path)
    with pytest.raises(papr_fx.ArgumentError, match=f"cannot read a clip from {path}"):
        read_video(path)


def test_frames_are_spread_over_the_video():
    video = torch.arange(10.0).view(10, 1, 1, 1)
    assert sample_frames(video, 4).flatten().tolist() == [0, 3, 6, 9]
    assert torch.equal(sample_frames(video, 10), video)
    with pytest.raises(papr_fx.ArgumentError, match="the clip has 10 frames, too few: the model takes 16"):
        sample_frames(video, 16)


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8)])
def test_views_are_those_of_the_papers_protocol(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = (rows if height > width else columns).float()
    video = torch.stack([100 * frame + place for frame in range(30)]).unsqueeze(1)  # (T, 1, H, W)
    views = sample_views(video, 4, step=3, size=8, temporal=5, spatial=3)
    assert views.shape == (15, 4, 1, 8, 8)
    starts = [0, 5, 10, 15, 20]  # 30 frames less a span of 10
    for number, view in enumerate(views):
        start, offset = starts[number // 3], (0, 4, 8)[number % 3]
        assert [round(float(frame.min()) // 100) for frame in view] == [start, start + 3, start + 6, start + 9]
        assert float(view[0].min()) == 100 * start + offset
        assert float(view[0].max()) == 100 * start + offset + 7
    (centre,) = sample_views(video, 4, step=3, size=8, temporal=1, spatial=1)
    assert float(centre[0].min()) == 100 * 10 + 4
    assert sample_views(video, 4, step=3, size=4, temporal=1, spatial=1).shape == (1, 4, 1, 4, 4)
    with pytest.raises(papr_fx.ArgumentError, match="floating point"):
        sample_views(video.to(torch.int32), 4)
    pixels = (video * 7 % 256).to(torch.uint8)
    torch.testing.assert_close(sample_views(pixels, 4), sample_views(pixels / 255, 4), rtol=0, atol=0)
    with pytest.raises(papr_fx.ArgumentError, match="30 frames, too few: 8 with a step of 5 span 36"):
        sample_views(video, 8, step=5)


class Colour(nn.Module):
    """Logits that are the mean colour of clips (B, C, T, H, W)."""

    def forward(self, x):
        return x.mean((2, 3, 4))


def test_scores_are_averaged_over_views():
    views = torch.randn(7, 4, 3, 6, 6)
    by_hand = torch.stack([view.mean((0, 2, 3)).softmax(0) for view in views]).mean(0)
    for size in (1, 3, 7):
        found = average_views(Colour(), views, layout="BCTHW", batch_size=size)
        torch.testing.assert_close(found, by_hand)
    with pytest.raises(papr_fx.ArgumentError, match="layout must be 'BTCHW' or 'BCTHW'"):
        average_views(Colour(), views, layout="THWC")


def test_frames_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("papr_fx.video_file._LARGEST", 1000)
    frames = [Image.new("RGB", (50, 30), (level, 0, 0)) for level in (0, 100, 200)]
    for suffix in ("gif", "webp"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(papr_fx.ArgumentError, match=f"a.{suffix}: its frames have 50 x 30 pixels, more than 1000"):
            read_video(path)
    frames[0].resize((30, 30)).save(path, save_all=True, append_images=[frame.resize((30, 30)) for frame in frames[1:]])
    assert read_video(path).shape == (3, 3, 30, 30)


def test_a_damaged_animation_is_refused_by_name(tmp_path):
    frames = [Image.effect_noise((64, 48), 90).convert("RGB") for _ in range(4)]
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    whole = path.read_bytes()
    for size in (13, 40, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:size])
        with pytest.raises(papr_fx.ArgumentError, match=r"cannot read a clip from .*a\.webp"):
            read_video(path)


def test_errors_of_the_callers_own_code_stay(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, moving_square())
    with pytest.raises(ZeroDivisionError):
        read_video(path, frames=lambda count: [count // 0])
