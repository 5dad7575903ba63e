"""The smallest model that a trainer takes."""

import torch
from torch import nn


class Toy(nn.Module):
    """Gives a loss of a batch of numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2, 1)

    def forward(self, batch):
        return {"loss": self.fc(batch).pow(2).mean()}
