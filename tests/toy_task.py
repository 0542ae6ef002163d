"""Source of a module with a model and functions of a task that cost nothing, for searches that name their functions."""

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

INPUTS = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
EXAMPLE = INPUTS[:1]
WANTED = Net().eval()(INPUTS).detach()

def loader():
    return [INPUTS[:32], INPUTS[32:]]

def error(model):
    return (model(INPUTS) - WANTED).square().mean().sqrt()
"""


def functions(module):
    """Return the section `task` that names the functions of the module."""
    return {
        "calibration": f"{module}:loader",
        "evaluate": f"{module}:error",
        "inputs": f"{module}:EXAMPLE",
        "metric": {"name": "error", "higher_is_better": False, "best": 0.0},
    }
