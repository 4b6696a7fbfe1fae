"""Architecture of the bundled network: a residual network for small images.

The blocks are those of torchvision's ResNet; what differs is the stem, which keeps
the resolution, and the widths, a quarter to a half of ResNet-18's.
"""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

TRAINED_AT = 32  # pixels
# In random crops, objects are on average 1.25 times as large as in the whole image, so
# predictions are best at this size (Touvron et al., *Fixing the Train-Test Resolution
# Discrepancy*, 2019).
IMAGE_SIZE = 40
MEAN = (0.480, 0.448, 0.398)
STD = (0.276, 0.269, 0.282)
WIDTHS = (32, 64, 128, 256)


class ResNetMini(nn.Module):
    """Residual network of 2.8 million parameters for small images.

    Parameters
    ----------
    num_classes : int or None, default=None
        Number of categories of the head. None means the 200 of its training.

    References
    ----------
    He, Zhang, Ren, Sun: *Deep Residual Learning for Image Recognition*, 2016
    (section 4.2 has the variant that keeps the resolution of small images).
    """

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTHS[0]),
            nn.ReLU(inplace=True),
        )
        # (n, 3, 40, 40) -> 40 x 40 -> 40 x 40 -> 20 x 20 -> 10 x 10 -> 5 x 5
        self.stages = nn.ModuleDict({"stem": stem})
        width_in = WIDTHS[0]
        for number, width in enumerate(WIDTHS, start=1):
            stride = 1 if number == 1 else 2
            self.stages[f"stage{number}"] = nn.Sequential(
                _block(width_in, width, stride), _block(width, width, 1)
            )
            width_in = width
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width_in, num_classes or 200),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                # Every block is initialized as the identity, which permits a large
                # learning rate (Goyal et al., 2017, section 5.1).
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(n, num_classes)`` of images ``(n, 3, h, w)``."""
        for stage in self.stages.values():
            x = stage(x)
        logits: Tensor = self.head(x)  # (n, 256, h / 8, w / 8) -> (n, num_classes)
        return logits


def _block(width_in: int, width: int, stride: int) -> BasicBlock:
    shortcut = None
    if stride != 1 or width_in != width:
        shortcut = nn.Sequential(
            nn.Conv2d(width_in, width, 1, stride=stride, bias=False),
            nn.BatchNorm2d(width),
        )
    return BasicBlock(width_in, width, stride, shortcut)
