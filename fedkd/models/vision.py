"""Students for images, of any size from 8 by 8 pixels and any number of channels."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedkd.models.base import Body, Classifier, GlobalAverage, Norm, conv_norm, he_initialise

Width = Annotated[float, Field(gt=0, le=64)]
Shape = tuple[int, ...]


def cnn(num_classes: int, input_shape: Shape, norm: Norm, *, width: Width = 1.0) -> Classifier:
    """Two 3x3 convolutions of 16 and 32 channels, a hidden layer of 64; option width."""
    return _convolutional(num_classes, input_shape, norm, width, channels=(16, 32), kernel=3, hidden=64)


def fedavg_cnn(num_classes: int, input_shape: Shape, norm: Norm, *, width: Width = 1.0) -> Classifier:
    """The FedAvg paper's two 5x5 convolutions of 32 and 64 channels, hidden layer of 512; option width.

    McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
    section 3: with ``norm = "none"`` it has the paper's 1,663,370 parameters on 28x28 grey images.
    """
    return _convolutional(num_classes, input_shape, norm, width, channels=(32, 64), kernel=5, hidden=512)


def _convolutional(
    num_classes: int,
    input_shape: Shape,
    norm: Norm,
    width: float,
    *,
    channels: tuple[int, ...],
    kernel: int,
    hidden: int,
) -> Classifier:
    before, height, across = input_shape
    stages = []
    for channel in channels:
        after = _scaled(channel, width)
        # Pooling first leaves ReLU a quarter of the work; the maximum commutes with it, bits included.
        stages.append(nn.Sequential(*conv_norm(before, after, kernel, norm), nn.MaxPool2d(2), nn.ReLU()))
        before, height, across = after, height // 2, across // 2
    units = _scaled(hidden, width)
    neck = nn.Sequential(nn.Flatten(), nn.Linear(before * height * across, units), nn.ReLU())
    return Classifier(Body(stages, neck), nn.Linear(units, num_classes))


class Block(nn.Module):
    """Basic residual block: two 3x3 convolutions around a shortcut.

    Parameters
    ----------
    in_channels, out_channels : int
        Where they differ, or the stride is not 1, the shortcut is a 1x1 convolution.
    norm : {"group", "batch", "none"}
        Normalisation after every convolution.
    stride : int
        Of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv_norm(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2, self.norm2 = conv_norm(out_channels, out_channels, 3, norm)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = (
            nn.Sequential(*conv_norm(in_channels, out_channels, 1, norm, stride=stride)) if changes else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [N, out_channels, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet8(num_classes: int, input_shape: Shape, norm: Norm, *, width: Width = 1.0) -> Classifier:
    """CIFAR ResNet with 8 layers, 16-32-64 channels; option width."""
    return _resnet(1, num_classes, input_shape, norm, width)


def resnet20(num_classes: int, input_shape: Shape, norm: Norm, *, width: Width = 1.0) -> Classifier:
    """CIFAR ResNet with 20 layers, 16-32-64 channels; option width."""
    return _resnet(3, num_classes, input_shape, norm, width)


def resnet32(num_classes: int, input_shape: Shape, norm: Norm, *, width: Width = 1.0) -> Classifier:
    """CIFAR ResNet with 32 layers, 16-32-64 channels; option width."""
    return _resnet(5, num_classes, input_shape, norm, width)


def _resnet(blocks: int, num_classes: int, input_shape: Shape, norm: Norm, width: float) -> Classifier:
    """He et al., Deep Residual Learning, CVPR 2016, section 4.2; shortcuts project, as in FedDF's code."""
    before = _scaled(16, width)
    stem = nn.Sequential(*conv_norm(input_shape[0], before, 3, norm), nn.ReLU())
    stages = []
    for channel, stride in ((16, 1), (32, 2), (64, 2)):
        after = _scaled(channel, width)
        row = [Block(before if i == 0 else after, after, norm, stride if i == 0 else 1) for i in range(blocks)]
        stages.append(nn.Sequential(*row))
        before = after
    stages[0].insert(0, stem)
    model = Classifier(Body(stages, GlobalAverage()), nn.Linear(before, num_classes))
    he_initialise(model)
    if norm == "none":
        # Without norms the variance doubles with every block; a branch that starts at zero keeps it
        # (Zhang et al., Fixup Initialization, ICLR 2019).
        for module in model.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.conv2.weight)  # type: ignore[arg-type]
    return model


def vgg9(num_classes: int, input_shape: Shape, norm: Norm, *, width: Width = 1.0) -> Classifier:
    """FedDF's VGG-9: eight 3x3 convolutions of 32 to 256 channels, five poolings; option width.

    Lin et al., Ensemble Distillation for Robust Model Fusion in Federated Learning, NeurIPS 2020; the authors
    have no norm layers in it (``norm = "none"``). Pooling rounds up, so that small images survive all five.
    """
    before, stages = input_shape[0], []
    for channels in ((32,), (64,), (128, 128), (256, 256), (256, 256)):
        layers: list[nn.Module] = []
        for channel in channels:
            after = _scaled(channel, width)
            layers += [*conv_norm(before, after, 3, norm), nn.ReLU()]
            before = after
        stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
    model = Classifier(Body(stages, GlobalAverage()), nn.Linear(before, num_classes))
    he_initialise(model)
    return model


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))
