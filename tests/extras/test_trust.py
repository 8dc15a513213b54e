"""Of torchvision and timm, another run may name networks, layers and losses, and no weights from a file."""

from typing import Any

import pytest

from syncbn.training.config import trust

SAFE = [
    *("timm.create_model", "timm.models.create_model", "timm.models.resnet18", "timm.models.resnet.resnet18"),
    *("timm.models.ResNet", "timm.models.resnet.ResNet", "timm.layers.BatchNormAct2d", "timm.optim.Lamb"),
    *("timm.loss.LabelSmoothingCrossEntropy", "torchvision.models.resnet50", "torchvision.models.resnet.resnet50"),
    *("torchvision.models.ResNet", "torchvision.models.get_model", "torchvision.models.segmentation.fcn_resnet50"),
    *("torchvision.ops.FrozenBatchNorm2d", "torchvision.transforms.v2.RandomErasing"),
]
UNSAFE = [
    *("timm.models.load_checkpoint", "timm.models.load_pretrained", "timm.models.load_state_dict", "timm.list_models"),
    *("timm.models._helpers.load_checkpoint", "timm.layers.load_custom_pretrained", "timm.data.create_dataset"),
    *("timm.models.register_model", "timm.models.build_model_with_cfg", "timm.models.FeatureGraphNet"),
    *("timm.models.resnet.partial", "timm.models.resnet.torch.load", "timm.models.resnet.nn.Linear"),
    *("torchvision.datasets.MNIST", "torchvision.io.read_file", "torchvision.ops.nms", "torchvision.models.get_weight"),
    *("torchvision.models.resnet.partial", "torchvision.models.resnet.nn.Linear", "torchvision.transforms.Lambda"),
    *("torchvision.models.feature_extraction.DualGraphModule", "torchvision.models.quantization.resnet18"),
]
TIMM = {"_target_": "timm.create_model", "model_name": "resnet18"}
TORCHVISION = {"_target_": "torchvision.models.resnet50"}


@pytest.mark.parametrize("target", SAFE)
def test_constructors_are_safe(target: str) -> None:
    assert trust.is_safe(target)


@pytest.mark.parametrize("target", UNSAFE)
def test_what_reads_files_or_runs_code_is_not(target: str) -> None:
    assert not trust.is_safe(target)


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (TIMM | {"num_classes": 10, "act_layer": "gelu", "drop_path_rate": 0.1, "pretrained": False}, None),
        (TIMM | {"norm_layer": {"_target_": "torch.nn.BatchNorm2d", "_partial_": True}}, None),
        (TIMM | {"pretrained": True}, "pretrained"),
        (TIMM | {"checkpoint_path": "file"}, "checkpoint_path"),
        (TIMM | {"pretrained_cfg": {"file": "file"}}, "pretrained_cfg"),
        (TIMM | {"model_name": "hf-hub:somebody/net"}, "model_name"),
        (TIMM | {"model_name": "local-dir:somewhere"}, "model_name"),
        (TIMM | {"_args_": ["resnet18", True]}, "_args_"),
        (TORCHVISION | {"weights": None, "num_classes": 10, "zero_init_residual": True}, None),
        (TORCHVISION | {"weights": "DEFAULT"}, "weights"),
        (TORCHVISION | {"pretrained": True}, "pretrained"),
    ],
)
def test_weights_come_from_the_checkpoint_alone(theirs: dict[str, Any], named: str | None) -> None:
    expected = {} if named is None else {f"model.{named}": theirs[named]}
    assert trust.refused(theirs, None, "model") == expected
    assert trust.refused(theirs, theirs, "model") == {}  # the user has said so
