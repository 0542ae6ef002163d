"""A zip of labelled images becomes the file that the `arrays` reader reads."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from secateur.envs.tasks import convert_sample
from secateur.envs.tasks.data import load_data


def write_sample(source, sizes=((6, 5),) * 4, names=("0000_a.png", "0001_b.png", "0002_c.png", "0002_d.png"), classes=3):
    source.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    with zipfile.ZipFile(source / "images.zip", "w") as archive:
        for name, image in reversed(list(zip(names, images, strict=True))):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            archive.writestr(name, file.getvalue())
    rows = [f"{index},n{index},name {index}\n" for index in range(classes)]
    (source / "classes.csv").write_text("index,wnid,name\n" + "".join(rows))
    return images


@pytest.mark.parametrize("turn", [False, True])
def test_the_reader_gets_the_pixels_and_labels(tmp_path, turn, capsys):
    images = write_sample(tmp_path / "sample")
    target = tmp_path / "new" / "sample.npz"
    assert convert_sample.main([str(tmp_path / "sample"), str(target), *(["--turn"] if turn else [])]) == 0
    assert "wrote 4 images" in capsys.readouterr().out and [path.name for path in target.parent.iterdir()] == ["sample.npz"]
    data = load_data("arrays", target, calibration=1, validation=1, input_shape=(3, 5, 6))
    splits = (data.calibration, data.validation, data.test)
    found = {image.tobytes(): label for split in splits for image, label in zip(split.images, split.labels, strict=True)}
    expected = [np.rot90(image, 2) if turn else image for image in images]
    assert [found[image.transpose(2, 0, 1).tobytes()] for image in expected] == [0, 1, 2, 2]
    assert data.classes == ("name 0", "name 1", "name 2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": ((6, 5), (6, 5), (6, 5), (5, 6))}, "different sizes"),
        ({"classes": 2}, "image of class 2"),
        ({"names": ("0000_a.png", "cat.png", "0002_c.png", "0002_d.png")}, "`cat.png` must start with the index"),
        ({"names": (), "sizes": ()}, "holds no images"),
        ({"classes": 0}, "must have the columns"),
    ],
)
def test_samples_that_do_not_fit_end_with_exit_code_2_and_nothing_written(tmp_path, changes, words, capsys):
    write_sample(tmp_path / "sample", **changes)
    assert convert_sample.main([str(tmp_path / "sample"), str(tmp_path / "new" / "sample.npz")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_missing_and_damaged_files_end_with_exit_code_2(tmp_path, capsys):
    source, target = tmp_path / "sample", tmp_path / "sample.npz"
    assert convert_sample.main([str(source), str(target)]) == 2
    assert "must hold images.zip and classes.csv" in capsys.readouterr().err
    write_sample(source)
    assert convert_sample.main([str(source), str(tmp_path / "sample.txt")]) == 2
    (source / "images.zip").write_bytes(b"nothing")
    assert convert_sample.main([str(source), str(target)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert convert_sample.main([]) == convert_sample.main(["a", "b", "--turn", "--twice"]) == 2
    assert not target.exists()
