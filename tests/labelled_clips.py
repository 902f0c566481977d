"""Videos in class folders, a small VideoMAE that tells them apart, and a video of a moving square."""

import torch
import transformers

from papr_fx.video import read_video, sample_views, write_video

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
WORDS = ("hop", "run", "swim")


def write_clips(root):
    """Seven videos in three classes, of which two are short and one is not a video; and a small VideoMAE."""
    for i in range(7):
        path = root / "kinetics" / "val" / WORDS[i % 3] / f"{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = torch.rand(3 if i in (2, 3) else 14, 3, 32, 40, generator=torch.Generator().manual_seed(i))
        write_video(path, frames)
    (root / "kinetics" / "val" / "run" / "4.mp4").write_bytes(b"no video")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.VideoMAEConfig(image_size=32, patch_size=8, num_frames=4, num_labels=3, **sizes)
    model = transformers.VideoMAEForVideoClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.5))
        views = [views_of(root / "kinetics" / "val" / WORDS[i % 3] / f"{i}.mp4") for i in range(7) if i != 4]
        model.classifier.bias -= model.eval()(torch.cat(views)).logits.mean(0)  # so that each class comes first somewhere
    model.save_pretrained(root / "model")
    transformers.VideoMAEImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(root / "model")


def views_of(path):
    """(2 clips x 2 crops, 4 frames, 3, 32, 32) of every second frame."""
    video = read_video(path) / 255
    while len(video) < 7:
        video = torch.cat([video, video[-1:]])
    views = sample_views(video, 4, step=2, size=32, temporal=2, spatial=2)
    return (views - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def moving_square(frames: int = 24, height: int = 50, width: int = 70) -> torch.Tensor:
    """(T, 3, H, W) in [0, 1]: a bright square that moves to the right over grey."""
    video = torch.full((frames, 3, height, width), 0.3)
    for frame in range(frames):
        video[frame, :, 10:30, 2 * frame : 2 * frame + 20] = torch.tensor([0.9, 0.8, 0.2]).view(3, 1, 1)
    return video
