"""Blocks that change the channels of a map by what is in the whole of it.

Papers: Jie Hu, Li Shen, Samuel Albanie, Gang Sun, Enhua Wu: Squeeze-and-Excitation Networks, 2017,
arXiv 1709.01507; Yue Cao, Jiarui Xu, Stephen Lin, Fangyun Wei, Han Hu: GCNet: Non-local Networks
Meet Squeeze-Excitation Networks and Beyond, 2019, arXiv 1904.11492.

Legend: N images, C channels, H and W height and width.
"""

from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Weighs each channel by a number in (0, 1) that follows from the means of all channels."""

    # Names of layers as in pycls and Detectron2.
    def __init__(self, channels: int, squeezed_channels: int) -> None:
        super().__init__()
        self.f_ex = nn.Sequential(
            nn.Conv2d(channels, squeezed_channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed_channels, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W)."""
        return x * self.f_ex(x.mean(dim=(2, 3), keepdim=True))


class ContextBlock(nn.Module):
    """Adds to every pixel a vector that follows from a weighted mean over the map.

    Weights of the mean are the softmax of a 1x1 convolution. A new block adds 0.
    """

    # Names of layers as in MMDetection's weights.
    def __init__(self, channels: int, squeezed_channels: int) -> None:
        super().__init__()
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        last = nn.Conv2d(squeezed_channels, channels, 1)
        self.channel_add_conv = nn.Sequential(
            nn.Conv2d(channels, squeezed_channels, 1),
            nn.LayerNorm([squeezed_channels, 1, 1]),
            nn.ReLU(inplace=True),
            last,
        )
        nn.init.kaiming_normal_(self.conv_mask.weight, nonlinearity="relu")
        assert self.conv_mask.bias is not None
        for parameter in (self.conv_mask.bias, *last.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W)."""
        weights = self.conv_mask(x).flatten(2).softmax(dim=2)  # (N, 1, H * W)
        context = x.flatten(2) @ weights.transpose(1, 2)  # (N, C, 1)
        return x + self.channel_add_conv(context[..., None])
