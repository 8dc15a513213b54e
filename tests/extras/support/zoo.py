"""The models: of each of timm's families and each of torchvision's that has batch norm a small one."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Entry:
    """A model of timm: its name, the shape of a sample that it takes, and what makes it smaller than as published."""

    name: str
    shape: tuple[int, ...] = (3, 64, 64)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"timm.{self.name}"

    def model(self) -> nn.Module:
        return timm.create_model(self.name, **self.options)


class Torchvision(Entry):
    """A model of torchvision."""

    def __str__(self) -> str:
        return f"torchvision.{self.name}"

    def model(self) -> nn.Module:
        parameters = inspect.signature(torchvision.models.get_model_builder(self.name)).parameters
        downloads = {name: None for name in ("weights", "weights_backbone") if name in parameters}
        return torchvision.models.get_model(self.name, **downloads, **self.options)


LARGER, FULL = (3, 96, 96), (3, 224, 224)
SMALL = {"img_size": 64}

# By family, which is a module of timm.models.
TIMM = {
    "byoanet": Entry("lambda_resnet26t"),
    "byobnet": Entry("test_byobnet"),
    "convmixer": Entry("convmixer_1024_20_ks9_p14"),
    "cpubone": Entry("cpubone_nano"),
    "cspnet": Entry("cs3darknet_focus_s"),
    "cspnext": Entry("cspnext_tiny"),
    "densenet": Entry("densenet121", options={"block_config": (2, 2, 2, 2)}),
    "dla": Entry("dla46x_c"),
    "dpn": Entry("dpn48b"),
    "efficientformer": Entry("efficientformer_l1", FULL),
    "efficientformer_v2": Entry("efficientformerv2_s0", options=SMALL),
    "efficientnet": Entry("test_efficientnet"),
    "efficientvim": Entry("efficientvim_m1"),
    "efficientvit_mit": Entry("efficientvit_b0"),
    "efficientvit_msra": Entry("efficientvit_m0", (3, 128, 128), {"img_size": 128}),
    "fasternet": Entry("fasternet_t0"),
    "fastvit": Entry("fastvit_t8"),
    "ghostnet": Entry("ghostnet_050"),
    "hardcorenas": Entry("hardcorenas_b"),
    "hgnet": Entry("hgnetv2_b0"),
    "hrnet": Entry("hrnet_w18_small"),
    "iformer": Entry("iformer_t"),
    "inception_next": Entry("inception_next_atto"),
    "inception_resnet_v2": Entry("inception_resnet_v2", LARGER),
    "inception_v3": Entry("inception_v3", LARGER),
    "inception_v4": Entry("inception_v4", LARGER),
    "lcnetv2": Entry("lcnetv2_small"),
    "levit": Entry("levit_128s", options=SMALL),
    "lowformer": Entry("lowformer_b0"),
    "maxxvit": Entry("test_coatnet", options=SMALL),
    "mobilenetv3": Entry("mobilenetv3_small_050"),
    "mobilevit": Entry("mobilevit_xxs"),
    "nasnet": Entry("nasnetalarge"),
    "nextvit": Entry("nextvit_small"),
    "pnasnet": Entry("pnasnet5large"),
    "regnet": Entry("regnety_002"),
    "repghost": Entry("repghostnet_050"),
    "repvit": Entry("repvit_m1"),
    "res2net": Entry("res2next50"),
    "resnest": Entry("resnest14d"),
    "resnet": Entry("test_resnet"),
    "resnetv2": Entry("resnetv2_18"),
    "rexnet": Entry("rexnet_100"),
    "selecsls": Entry("selecsls42"),
    "senet": Entry("legacy_seresnet18"),
    "shvit": Entry("shvit_s1"),
    "sknet": Entry("skresnet18"),
    "starnet": Entry("starnet_s050"),
    "swiftformer": Entry("swiftformer_xs"),
    "tiny_vit": Entry("tiny_vit_5m_224"),
    "tresnet": Entry("tresnet_m", options={"width_factor": 0.25}),
    "vgg": Entry("vgg11_bn", options={"mlp_ratio": 1 / 64}),
    "visformer": Entry("visformer_tiny", options=SMALL),
    "vision_transformer_hybrid": Entry(
        "vit_small_resnet50d_s16_224", options=SMALL | {"embed_dim": 64, "depth": 1, "num_heads": 2}
    ),
    "volo": Entry("volo_d1_224", options=SMALL),
    "vovnet": Entry("ese_vovnet19b_slim_dw"),
    "xception": Entry("legacy_xception"),
    "xception_aligned": Entry("xception41p"),
    "xcit": Entry("xcit_nano_12_p8_224", options=SMALL | {"depth": 2}),
}

# The families of timm that have no batch norm in any of their models.
WITHOUT = {
    "beit", "cait", "coat", "convit", "convnext", "crossvit", "csatv2", "davit", "deepseek_vit", "deit", "edgenext",
    "eva", "focalnet", "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "mambaout", "metaformer", "mlp_mixer",
    "mobilenetv5", "mvitv2", "naflexvit", "nest", "nfnet", "pit", "pvt_v2", "qwen3_vit", "rdnet", "sequencer",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "twins", "vision_transformer",
    "vision_transformer_relpos", "vision_transformer_sam", "vitamin",
}  # fmt: skip

VIDEO = (3, 4, 24, 24)
TORCHVISION = [
    Torchvision("resnet18"),
    Torchvision("resnext50_32x4d"),
    Torchvision("densenet121"),
    Torchvision("googlenet", options={"aux_logits": True, "init_weights": False}),
    Torchvision("inception_v3", LARGER, {"aux_logits": True, "init_weights": False}),
    Torchvision("mobilenet_v2"),
    Torchvision("mobilenet_v3_small"),
    Torchvision("efficientnet_b0"),
    Torchvision("mnasnet0_5"),
    Torchvision("shufflenet_v2_x0_5"),
    Torchvision("regnet_y_400mf"),
    Torchvision("lraspp_mobilenet_v3_large"),
    Torchvision("deeplabv3_mobilenet_v3_large"),
    Torchvision("fcn_resnet50"),
    Torchvision("r3d_18", VIDEO),
    Torchvision("mc3_18", VIDEO),
    Torchvision("r2plus1d_18", VIDEO),
]

# Dear to run, or in want of torchvision's operators. What convert does to their layers can be seen all the same.
LOOKED_AT = [
    Torchvision("fasterrcnn_mobilenet_v3_large_320_fpn"),
    Torchvision("fasterrcnn_resnet50_fpn_v2"),
    Torchvision("retinanet_resnet50_fpn"),
    Torchvision("ssdlite320_mobilenet_v3_large"),
    Torchvision("raft_large"),
    Torchvision("s3d"),
    Torchvision("maxvit_t"),
    Torchvision("vgg19_bn"),
    Torchvision("wide_resnet101_2"),
    Torchvision("efficientnet_v2_s"),
]
RUN = [*TIMM.values(), *TORCHVISION]


def build(entry: Entry) -> nn.Module:
    """A model in evaluation whose batch norms hold something: trained statistics, not those of a new layer."""
    torch.manual_seed(0)
    model = entry.model()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not layer.running_mean.is_meta:
            trained(layer)
    return model.eval()


@torch.no_grad()
def trained(layer: _BatchNorm) -> None:
    layer.running_mean.normal_(0, 0.1)
    layer.running_var.uniform_(0.5, 1.5)
    layer.weight.uniform_(0.5, 1.5)
    layer.bias.normal_(0, 0.1)


def batch(entry: Entry, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, *entry.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
