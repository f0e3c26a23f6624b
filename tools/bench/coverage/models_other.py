"""Models of other packages, and recurrent taggers of torch's own layers, which nobody packages."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import nn

from torchlathe.tools.bench.coverage.entry import VOCABULARY, Entry, Inputs, builder, image

__all__ = ["OTHER"]


class _Tagger(nn.Module):
    """Embedding, a recurrent layer of torch, and a label for each token."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.recurrent = getattr(nn, kind)(24, 32, batch_first=True, **options)
        width = 64 if options.get("bidirectional") else 32
        self.dense = nn.Linear(width, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.recurrent(self.embed(tokens))
        out: torch.Tensor = self.head(torch.relu(self.dense(hidden)))
        return out


class _Speech(nn.Module):
    """Convolutions over a spectrogram, a GRU over time, and characters, as in Deep Speech 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, (5, 3), (2, 1), (2, 1)),
            nn.BatchNorm2d(8),
            nn.Hardtanh(0, 20),
            nn.Conv2d(8, 12, (5, 3), (2, 1), (2, 1)),
            nn.BatchNorm2d(12),
            nn.Hardtanh(0, 20),
        )
        self.recurrent = nn.GRU(48, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 29)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = x.flatten(1, 2).transpose(1, 2)
        out: torch.Tensor = self.head(self.recurrent(x)[0]).log_softmax(-1)
        return out


class _PerNode(nn.Module):
    """A graph net of torch_geometric over one graph with a fixed number of edges."""

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__()
        self.net = builder(f"torch_geometric.nn.{path}", **options)()

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> Any:
        return self.net(x, edges)


def _tokens(batch: int) -> Inputs:
    return (torch.randint(3, VOCABULARY, (batch, 11)),), {}


def _graph(nodes: int) -> Inputs:
    return (torch.randn(nodes, 12), torch.randint(0, nodes, (2, 30))), {}


def _tagger(name: str, kind: str, **options: Any) -> Entry:
    return Entry(f"torch/{name}", lambda: _Tagger(kind, **options), _tokens)


def _geometric(name: str, path: str, **options: Any) -> Entry:
    def make() -> nn.Module:
        return _PerNode(path, in_channels=12, hidden_channels=24, num_layers=3, **options)

    # What varies is the number of nodes: a batch of graphs is one large graph.
    shapes = ({0: torch.export.Dim.DYNAMIC}, None)
    return Entry(f"torch_geometric/{name}", make, _graph, shapes, (9, 14))


def _unet(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 16, 16), torch.arange(batch)), {"return_dict": False}


def _conditional(batch: int) -> Inputs:
    args = torch.randn(batch, 4, 16, 16), torch.arange(batch), torch.randn(batch, 5, 16)
    return args, {"return_dict": False}


def _hidden(batch: int) -> Inputs:
    kwargs = {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "timestep": torch.arange(batch),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
        "return_dict": False,
    }
    return (), kwargs


def _labelled(batch: int) -> Inputs:
    kwargs = {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "timestep": torch.arange(batch),
        "class_labels": torch.arange(batch),
        "return_dict": False,
    }
    return (), kwargs


def _sd3(batch: int) -> Inputs:
    args, kwargs = _hidden(batch)
    return args, {**kwargs, "pooled_projections": torch.randn(batch, 12)}


def _plain(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 16, 16),), {"return_dict": False}


def _diffusers(name: str, model: str, inputs: Any, **options: Any) -> Entry:
    return Entry(f"diffusers/{name}", builder(f"diffusers.{model}", **options), inputs)


_TORCH: Final = (
    _tagger("lstm_tagger", "LSTM"),
    _tagger("bilstm_tagger", "LSTM", bidirectional=True, num_layers=2),
    _tagger("gru_tagger", "GRU"),
    _tagger("bigru_tagger", "GRU", bidirectional=True, num_layers=2),
    _tagger("rnn_tagger", "RNN"),
    Entry("torch/deep_speech", _Speech, image(1, 16, 12)),
    Entry(
        "torch/transformer_encoder",
        lambda: nn.Sequential(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True),
                2,
                enable_nested_tensor=False,
            ),
            nn.Linear(32, 5),
        ),
        image(7, 32),
    ),
)

_BLOCKS: Final[dict[str, Any]] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_DIFFUSERS: Final = (
    _diffusers(
        "unet2d",
        "UNet2DModel",
        _unet,
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **_BLOCKS,
    ),
    _diffusers(
        "unet2d_condition",
        "UNet2DConditionModel",
        _conditional,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        **_BLOCKS,
    ),
    _diffusers(
        "autoencoder_kl",
        "AutoencoderKL",
        _plain,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **_BLOCKS,
    ),
    _diffusers("autoencoder_tiny", "AutoencoderTiny", _plain,
               encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
               num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)),
    _diffusers("vq_model", "VQModel", _plain, block_out_channels=(16, 32), norm_num_groups=4,
               down_block_types=("DownEncoderBlock2D",) * 2,
               up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=32),
    _diffusers("dit", "DiTTransformer2DModel", _labelled, num_attention_heads=4,
               attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
               num_embeds_ada_norm=10),
    _diffusers("pixart", "PixArtTransformer2DModel", _hidden, num_attention_heads=4,
               attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
               cross_attention_dim=32, caption_channels=16, use_additional_conditions=False),
    _diffusers("sd3", "SD3Transformer2DModel", _sd3, sample_size=8, patch_size=2, in_channels=4,
               num_layers=2, attention_head_dim=8, num_attention_heads=4,
               joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=12,
               pos_embed_max_size=8),
)  # fmt: skip

_GEOMETRIC: Final = (
    _geometric("gcn", "models.GCN", out_channels=5),
    _geometric("graph_sage", "models.GraphSAGE", out_channels=5),
    _geometric("gat", "models.GAT", out_channels=5, heads=4),
    _geometric("gatv2", "models.GAT", out_channels=5, heads=4, v2=True),
    _geometric("gin", "models.GIN", out_channels=5),
    _geometric("edge_cnn", "models.EdgeCNN", out_channels=5),
)


def _installed(package: str) -> bool:
    return find_spec(package) is not None


# Neither is a dependency of the tests: without them the table is shorter.
OTHER: Final[tuple[Entry, ...]] = (
    *_TORCH,
    *(_DIFFUSERS if _installed("diffusers") else ()),
    *(_GEOMETRIC if _installed("torch_geometric") else ()),
)
