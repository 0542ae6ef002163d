"""The compressed module goes on in a Trainer of Lightning: as the user's LightningModule, or wrapped in another one."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur

pl = pytest.importorskip("pytorch_lightning", reason="needs the extra `lightning`")

# Lightning gives advice as warnings: about few workers, missing loggers, and parts of torch that it still uses.
pytestmark = pytest.mark.filterwarnings("ignore")

IMAGES, TARGETS = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3


class Lit(pl.LightningModule):
    """A network with its own training step, optimizer and record of losses."""

    def __init__(self, width=12):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 16, 3)
        )
        self.head, self.losses = nn.Linear(16, 3), []

    def forward(self, x):
        return self.head(torch.relu(self.features(x)).mean((2, 3)))

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("lightning"))
        run = secateur.search(
            Lit().eval(),
            inputs=IMAGES[:1],
            calibration=DataLoader(TensorDataset(IMAGES, TARGETS), batch_size=32),
            budgets={"half": {"macs": "<= 60%"}},
            agent="uniform",
            evaluations=1,
            workers=0,
        )
        yield run.best().model()


def fitted(module, folder):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=6, accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, TARGETS), batch_size=64))
    return trainer


def test_the_users_lightning_module_trains_on_with_smaller_layers(small, tmp_path):
    assert type(small) is Lit and small.features[0].out_channels < 12 and small.hparams.width == 12
    before = small.features[0].weight.detach().clone()
    small.losses.clear()
    trainer = fitted(small, tmp_path)
    assert trainer.state.finished and len(small.losses) == 6 and small.losses[-1] < small.losses[0]
    assert not torch.equal(small.features[0].weight, before)
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    assert list(checkpoint) == list(Lit().state_dict()), "a checkpoint has the keys of the dense module"


def test_the_network_inside_another_lightning_module_trains_on(small, tmp_path):
    class Wrapper(pl.LightningModule):
        def __init__(self, network):
            super().__init__()
            self.network, self.losses = network, []

        training_step = Lit.training_step
        configure_optimizers = Lit.configure_optimizers

        def forward(self, x):
            return self.network(x)

    wrapper = Wrapper(nn.Sequential(small.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), small.head))
    fitted(wrapper, tmp_path)
    assert wrapper.losses[-1] < wrapper.losses[0]
