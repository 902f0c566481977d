"""What evaluation reads: folders, shards, data sets and clips; damaged ones are told of."""

import io
import json
import tarfile

import pytest
import torch
import transformers
from PIL import Image

import papr_fx
from papr_fx.cli.main import main
from papr_fx.evaluation.readers import ClipDecoder, ImageDecoder, Samples, Shards, open_reader
from papr_fx.video import average_views, read_video, sample_views, write_video

# timm leaves the tar files open that it reads.
LEFT_OPEN = "ignore:.*name='.*tar':pytest.PytestUnraisableExceptionWarning"


def noise(seed):
    """The bytes of a small PNG image."""
    pixels = torch.randint(256, (12, 15, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


def to_tensor(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(12, 15, 3)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of five samples in three classes, as timm names them."""
    for shard in range(2):
        numbers = range(5 * shard, 5 * shard + 5)
        files = [(f"a/{i:04d}.{ending}", content) for i in numbers for ending, content in sample_files(i)]
        write_tar(tmp_path / f"set-val-{shard}.tar", files)
    names = ["set-val-0.tar", "set-val-1.tar"]
    split = {"name": "validation", "num_samples": 10, "filenames": names, "shard_lengths": [5, 5]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    return tmp_path


def sample_files(number):
    return [("png", noise(number)), ("cls", str(number % 3).encode()), ("json", b"{}")]


def read_all(reader):
    data = Samples(reader, ImageDecoder(to_tensor), (12, 15, 3))
    return [data[i] for i in range(len(data))]


def expected(number):
    with Image.open(io.BytesIO(noise(number))) as image:
        return to_tensor(image.convert("RGB"))


@pytest.mark.parametrize("split", ["validation", "set-val-{0..1}.tar"])
def test_shards(shards, split):
    found = read_all(open_reader(f"wds/{shards}", split=split))
    assert [sample.label for sample in found] == [i % 3 for i in range(10)]
    assert all(torch.equal(sample.pixels, expected(i)) for i, sample in enumerate(found))
    assert not any(sample.error for sample in found)
    assert open_reader("wds/", data_dir=str(shards)).filename(7) == "set-val-1.tar:a/0007"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", LEFT_OPEN)
def test_shards_as_timm_reads_them(shards):
    """Its stream holds the same images and classes, in one process."""
    from timm.data import create_dataset

    stream = create_dataset("wds/", root=str(shards), split="validation")
    for ours, (image, label) in zip(read_all(open_reader(f"wds/{shards}")), stream, strict=True):
        assert ours.label == label
        assert torch.equal(ours.pixels, to_tensor(image))


def test_damaged_shards(shards):
    files = [("0.png", noise(0)), ("0.cls", b"0"), ("1.cls", b"1"), ("2.png", noise(2)), ("3.png", noise(3)), ("3.cls", b"x")]
    write_tar(shards / "bad.tar", [*files, ("4.png", b"none"), ("4.cls", b"1")])
    found = read_all(Shards(str(shards), "bad.tar"))
    assert [sample.error.split(": ")[-1] for sample in found[:4]] == [
        "",
        "there is no image (jpg, png, webp)",
        "it has no class (.cls)",
        "b'x'",
    ]
    assert "bad.tar:4: UnidentifiedImageError" in found[4].error
    whole = (shards / "set-val-0.tar").read_bytes()
    (shards / "cut.tar").write_bytes(whole[: 4 * 2048 + 700])
    cut = read_all(Shards(str(shards), "cut.tar"))
    assert "cut.tar:its end: ValueError: the shard cannot be read so far: it is cut off" in cut[-1].error
    assert torch.equal(cut[0].pixels, expected(0))
    assert cut[0].label == 0
    write_tar(shards / "twice.tar", [("0.png", noise(0)), ("0.cls", b"0"), ("0.png", noise(1))])
    first, again = read_all(Shards(str(shards), "twice.tar"))
    assert torch.equal(first.pixels, expected(0))
    assert "holds 0.png twice" in again.error
    files = [("0.png", noise(0)), ("0.cls", b"0")]
    write_tar(shards / "both.tar", [*files, *files])
    assert len(read_all(Shards(str(shards), "both.tar"))) == 2
    (shards / "none.tar").write_bytes(b"none")
    (none,) = read_all(Shards(str(shards), "none.tar"))
    assert "the shard cannot be read so far" in none.error


def test_what_cannot_be_opened(shards, tmp_path, monkeypatch):
    with pytest.raises(papr_fx.ArgumentError, match="there is no folder nowhere"):
        open_reader("nowhere")
    with pytest.raises(papr_fx.ArgumentError, match="Found 0 images"):
        open_reader(str(tmp_path))
    with pytest.raises(papr_fx.ArgumentError, match="split train not found.*--split 'val-{00..07}.tar'"):
        open_reader(f"wds/{shards}", split="train")
    with pytest.raises(papr_fx.ArgumentError, match="No such file"):
        open_reader(f"wds/{shards}", split="none-{0..1}.tar")
    with pytest.raises(papr_fx.ArgumentError, match="classes of shards are numbers"):
        open_reader(f"wds/{shards}", class_map="a.txt")
    write_tar(shards / "empty.tar", [])
    with pytest.raises(papr_fx.ArgumentError, match="there are no samples"):
        open_reader(f"wds/{shards}", split="empty.tar")
    monkeypatch.setattr("papr_fx.evaluation.readers.find_spec", lambda name: None)
    with pytest.raises(papr_fx.ArgumentError, match="needs the eval extra"):
        open_reader(f"wds/{shards}")


@pytest.fixture
def folder(tmp_path):
    for i in range(9):
        path = tmp_path / "images" / "validation" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(i))
    return tmp_path / "images"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", LEFT_OPEN)
def test_folders_tars_and_hugging_face_data_sets(folder, tmp_path):
    order = [0, 3, 6, 1, 4, 7, 2, 5, 8]  # class by class
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder / "validation", "validation")
    for reader in (
        open_reader(str(folder)),
        open_reader(str(tmp_path / "images.tar")),
        open_reader(f"hfds/{folder}", data_dir=str(tmp_path / "cache")),
    ):
        found = read_all(reader)
        assert [sample.label for sample in found] == [i % 3 for i in order]
        assert all(torch.equal(sample.pixels, expected(i)) for i, sample in zip(order, found, strict=True))
    classes = tmp_path / "classes.txt"
    classes.write_text("class2\nclass0\nclass1\n")
    assert [sample.label for sample in read_all(open_reader(str(folder), class_map=str(classes)))] == [
        1,
        1,
        1,
        2,
        2,
        2,
        0,
        0,
        0,
    ]


def test_what_a_folder_holds_is_not_passed_over(folder, tmp_path):
    with pytest.raises(papr_fx.ArgumentError, match="holds no tset"):
        open_reader(str(folder), split="tset")
    (folder / "validation" / "train").mkdir()
    (folder / "validation" / "train" / "a.png").write_bytes(noise(0))
    with pytest.raises(papr_fx.ArgumentError, match="holds no test"):
        open_reader(str(folder / "validation"), split="test")
    (folder / "train" / "class0").mkdir(parents=True)
    (folder / "validation").rename(folder / "held_out")
    with pytest.raises(papr_fx.ArgumentError, match="holds train, and none to evaluate on"):
        open_reader(str(folder))
    (folder / "held_out").rename(folder / "validation")
    assert len(open_reader(str(folder / "validation"))) == 10  # a class by that name is none of the splits
    (folder / "validation" / "train" / "a.png").unlink()
    classes = tmp_path / "classes.txt"
    classes.write_text("class2\nclass1\n")
    with pytest.raises(papr_fx.ArgumentError, match="does not list 1 of the classes in .*, such as class0"):
        open_reader(str(folder), class_map=str(classes))


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_columns_of_a_data_set(folder, tmp_path):
    data = {"data": f"hfds/{folder}", "data_dir": str(tmp_path / "cache")}
    assert len(open_reader(**data, keys={"input_key": "image", "target_key": "label"})) == 9
    with pytest.raises(papr_fx.ArgumentError, match="cannot read samples"):
        open_reader(**data, keys={"input_key": "picture"})
    with pytest.raises(papr_fx.ArgumentError, match="columns of hfds/ data"):
        open_reader(str(folder), keys={"input_key": "image"})


@pytest.mark.parametrize("between", [",", " "])
def test_tables_of_paths(folder, tmp_path, between):
    def table(*lines):
        path = folder / "table.csv"
        path.write_text("".join(f"{between.join(line)}\n" for line in lines))
        return str(path)

    files = ("validation/class1/4.png", "validation/class0/0.png", "validation/class0/none.png")
    spaced = table((files[0], " 5"), (files[1], "7 "))
    assert [s.label for s in read_all(open_reader(spaced))] == [5, 7]
    found = read_all(open_reader(table(*zip(files, "201", strict=True))))
    assert [sample.label for sample in found] == [2, 0, -1]
    assert torch.equal(found[0].pixels, expected(4))
    assert "none.png: FileNotFoundError" in found[2].error
    assert [s.label for s in read_all(open_reader(table((files[0], "b"), (files[1], "a"))))] == [1, 0]
    classes = tmp_path / "classes.txt"
    classes.write_text("b\na\n7\n")
    assert read_all(open_reader(table((files[0], "7"), (files[1], "a")), class_map=str(classes)))[0].label == 2
    assert [s.label for s in read_all(open_reader(table((files[0], "b"), (files[1], "a")), class_map=str(classes)))] == [0, 1]
    with pytest.raises(papr_fx.ArgumentError, match="does not list the class 'c'"):
        open_reader(table((files[0], "c")), class_map=str(classes))
    assert [s.label for s in read_all(open_reader(table((files[0], "-1"), (files[1], "10"))))] == [-1, 10]
    with pytest.raises(papr_fx.ArgumentError, match="numbers or names, not both: 3 and 'label'"):
        open_reader(table(("path", "label"), (files[0], "3")))
    with pytest.raises(papr_fx.ArgumentError, match="line 1: there is no file .*path"):
        open_reader(table(("path", "label"), (files[0], "a")))
    with pytest.raises(papr_fx.ArgumentError, match="table.csv: a line is a path"):
        open_reader(table())
    with pytest.raises(papr_fx.ArgumentError, match="line 2: a line is a path and a class"):
        open_reader(table((files[0], "1"), (files[1],)))
    (folder / "a b.png").write_bytes(noise(4))
    assert torch.equal(read_all(open_reader(table(("a b.png", "1"))))[0].pixels, expected(4))
    moved = read_all(open_reader(table((files[0].removeprefix("validation/"), "1")), data_dir=str(folder / "validation")))
    assert torch.equal(moved[0].pixels, expected(4))


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
WORDS = ("hop", "run", "swim")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Seven videos in three classes, two of which are short, one of which is none; and a small VideoMAE."""
    root = tmp_path_factory.mktemp("clips")
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
    return root


def views_of(path):
    """(2 clips x 2 crops, 4 frames, 3, 32, 32) of every second frame."""
    video = read_video(path) / 255
    while len(video) < 7:
        video = torch.cat([video, video[-1:]])
    views = sample_views(video, 4, step=2, size=32, temporal=2, spatial=2)
    return (views - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_views(clips):
    decode = ClipDecoder(4, 32, (MEAN, STD), step=2, temporal=2, spatial=2)
    for number in (0, 2):
        path = clips / "kinetics" / "val" / WORDS[number % 3] / f"{number}.mp4"
        with path.open("rb") as source:
            found = decode(source)
        assert found.shape == (4, 4, 3, 32, 32)
        torch.testing.assert_close(found, views_of(path), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_videos_are_counted_by_the_mean_of_their_views(clips, tmp_path, batch_size):
    torch.save(timm_state(), tmp_path / "proposal.pth")
    results = tmp_path / "a.json"
    given = ["eval", clips / "kinetics", "--model", clips / "model", "--proposal", "test_resnet", "--z", "1,0.5"]
    given += [
        "--proposal-checkpoint",
        tmp_path / "proposal.pth",
        "--temporal-views",
        2,
        "--spatial-views",
        2,
        "--frame-step",
        2,
    ]
    given += ["--proposal-size", 64, "--workers", 0, "--batch-size", batch_size, "--results-file", results]
    assert main([str(part) for part in given]) == 0
    model = transformers.VideoMAEForVideoClassification.from_pretrained(clips / "model").eval()
    proposal = create_proposal(tmp_path / "proposal.pth")
    statistics = ((MEAN, STD), (proposal.pretrained_cfg["mean"], proposal.pretrained_cfg["std"]))
    gm = papr_fx.transform(model, proposal, 0.5, input_stats=statistics, proposal_size=64)
    paths = [clips / "kinetics" / "val" / WORDS[i % 3] / f"{i}.mp4" for i in range(7) if i != 4]
    best = {path: [int(average_views(form, views_of(path)).argmax()) for form in (model, gm)] for path in paths}
    rows = json.loads(results.read_text())["rows"]
    assert [row["count"] for row in rows] == [6, 6]
    assert [row["unreadable"] for row in rows] == [1, 1]
    for place, row in enumerate(rows):
        right = sum(found[place] == WORDS.index(path.parent.name) for path, found in best.items())
        agree = sum(found[place] == found[0] for found in best.values())
        assert (row["top1"], row["agreement"]) == (round(100 * right / 6, 3), round(100 * agree / 6, 3))
        assert row["videos_per_sec"] > 0


def timm_state():
    import timm

    torch.manual_seed(3)
    return timm.create_model("test_resnet").state_dict()


def create_proposal(path):
    import timm

    return timm.create_model("test_resnet", checkpoint_path=str(path)).eval()


def test_ratios_are_tuned_on_views(clips, capsys):
    given = ["tune", clips / "kinetics", "--model", clips / "model", "--proposal", "test_resnet", "--max-drop", 1]
    given += ["--temporal-views", 1, "--spatial-views", 1, "--frame-step", 2, "--workers", 0, "--proposal-size", 64]
    assert main([str(part) for part in given]) == 0
    assert "z = 0.05" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--img-size", "32"), ("--crop-pct", "0.9"), ("--checkpoint", "a.pth")])
def test_options_of_images_are_refused_for_clips(clips, option, capsys):
    assert main(["eval", str(clips / "kinetics"), "--model", str(clips / "model"), *option]) == 2
    assert f"{option[0]} is for models of timm" in capsys.readouterr().err
    assert main(["eval", str(clips / "kinetics"), "--model", "nothing"]) == 2
    assert "no video model named 'nothing'" in capsys.readouterr().err


def test_a_video_model_without_its_normalisation(clips, tmp_path, capsys):
    transformers.VideoMAEForVideoClassification.from_pretrained(clips / "model").save_pretrained(tmp_path / "model")
    assert main(["eval", str(clips / "kinetics"), "--model", str(tmp_path / "model")]) == 2
    assert "save its image processor there too" in capsys.readouterr().err
