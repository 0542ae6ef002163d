"""Detection: average precision of constructed answers, and torchvision's detectors by name."""

import numpy as np
import pytest
import torch
from torch import nn

from secateur.cost_models.core import InputError
from secateur.envs.inputs import ImageList
from secateur.envs.parts import take_parts
from secateur.envs.tasks.core import first_inputs
from secateur.envs.tasks.detection import Detection
from secateur.envs.tasks.models import load_model
from secateur.envs.tasks.splits import Split, TaskData

pytest.importorskip("torchmetrics.detection", reason="mAP needs the extra `metrics`")
pytest.importorskip("pycocotools", reason="mAP needs the extra `metrics`")

BOXES = np.full((6, 3, 5), -1, np.float32)
for index in range(6):
    BOXES[index, 0] = [4, 4, 20 + index, 20, index % 2]
    BOXES[index, 1] = [30, 30, 50, 50, 1]


def task(images=None):
    pixels = np.zeros((6, 3, 64, 64), np.float32) if images is None else images
    pixels[:, 0, 0, 0] = np.arange(6)  # each image holds its number
    split = Split(pixels, BOXES)
    return Detection(TaskData(split, split, split, None, (0.0,) * 3, (1.0,) * 3, 2, ("odd", "even"), "constructed"))


class Scripted(nn.Module):
    """Answers with the targets, shifted by some pixels, and perhaps without the second box."""

    def __init__(self, shift=0.0, boxes=2):
        super().__init__()
        self.shift, self.boxes = shift, boxes

    def forward(self, images):
        assert isinstance(images, list) and images[0].shape == (3, 64, 64)
        answers = []
        for image in images:
            rows = torch.from_numpy(BOXES[int(image[0, 0, 0])][: self.boxes])
            boxes = rows[:, :4] + self.shift
            answers.append({"boxes": boxes, "labels": rows[:, 4].long() + 1, "scores": torch.full((len(rows),), 0.9)})
        return answers


def test_average_precision_falls_with_the_overlap_and_with_missing_boxes():
    perfect = task().evaluate(Scripted(), "test")
    assert (perfect.score, perfect.samples, perfect.others["map_50"]) == (pytest.approx(1.0), 6, pytest.approx(1.0))
    # Shifted by 2 of 20 pixels, boxes overlap by 18^2 / (2 * 400 - 18^2) = 0.68, and less for narrower ones: 0.5 to 0.75.
    shifted = task().evaluate(Scripted(shift=2.0), "test")
    assert shifted.others["map_50"] == pytest.approx(1.0) and 0.2 < shifted.score < 0.5
    assert task().evaluate(Scripted(boxes=1), "test").score < 0.8
    assert task().evaluate(Scripted(shift=40.0), "test").score == 0


def test_rows_that_fill_up_are_no_boxes_and_classes_begin_where_the_option_says():
    (first, *_) = task().annotations(torch.from_numpy(BOXES))
    assert first["boxes"].shape == (2, 4) and first["labels"].tolist() == [1, 2]


def test_inputs_are_lists_of_images():
    (inputs,) = first_inputs(task(), "validation", 4)
    assert isinstance(inputs, ImageList) and len(inputs) == 4 and isinstance(inputs[:2], ImageList)


def test_other_outputs_are_refused():
    with pytest.raises(InputError, match="a list with {boxes, labels, scores} of each image"):
        task().check(torch.zeros(1, 5))


def test_the_parts_of_torchvisions_detectors_are_found():
    args = {"num_classes": 3, "min_size": 64, "max_size": 64}
    model = load_model("torchvision:fcos_resnet50_fpn", factory_args=args)
    assert task().parts_of(model) == ("backbone", "head") and task().parts_of(Scripted()) == ()
    parts_task, parts = take_parts(task(), model, task().parts_of(model))
    (inputs,) = first_inputs(parts_task, "validation", 2)
    with torch.no_grad():
        outputs = parts(*inputs)
    assert set(outputs["head"]) == {"cls_logits", "bbox_regression", "bbox_ctrness"} and len(outputs["head"]["cls_logits"]) == 2


class Training(nn.Module):
    """Returns losses in training only, as torchvision's detectors do; its batch norm must stay in evaluation."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)

    def forward(self, images, targets=None):
        found = self.head(self.norm(torch.stack(images))).mean()
        if not self.training:
            return [{"boxes": found} for _ in images]
        boxes = torch.cat([target["boxes"] for target in targets])
        return {"boxes": (found - boxes).abs().mean(), "labels": found**2}


def test_a_detector_in_evaluation_gives_its_loss_and_stays_as_it_is():
    """Importances need the loss of a model in evaluation."""
    detector = Training().eval()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    batch = next(task().batches("calibration"))
    loss = task().loss(detector, batch)
    loss.backward()
    assert detector.head.weight.grad.any() and not any(module.training for module in detector.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
