"""Hand-written recurrent networks, attention and transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .registry import Call, Case, call, quick

WIDTH, LENGTH, WORDS = 16, 7, 32


def steps(batch: int) -> Call:
    """Return a batch of sequences of vectors."""
    return call(torch.randn(batch, LENGTH, WIDTH))


def tokens(batch: int) -> Call:
    """Return a batch of token sequences."""
    return call(torch.randint(0, WORDS, (batch, LENGTH)))


class Recurrent(nn.Module):
    """Any of torch's recurrent modules with a head on its output and final state."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, 12, batch_first=True, **options)  # type: ignore[arg-type]
        sample, _ = self.rnn(torch.zeros(1, 1, WIDTH))
        self.head = nn.Linear(sample.shape[-1], 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        y, state = self.rnn(x)
        return self.head(y), state


class PackedLSTM(nn.Module):
    """Packs inside the forward; lengths are in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, 12, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return y


class TakesPacked(nn.Module):
    """Is handed a PackedSequence and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, 12)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        return self.rnn(packed)[0]


class CellLoop(nn.Module):
    """Unrolls the three cells by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(WIDTH, 12)
        self.gru = nn.GRUCell(12, 12)
        self.rnn = nn.RNNCell(12, 12, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        h = c = g = r = x.new_zeros(x.shape[0], 12)
        outputs = []
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            g = self.gru(h, g)
            r = self.rnn(g, r)
            outputs.append(r)
        return torch.stack(outputs, 1)


class CharLSTM(nn.Module):
    """Embedding, LSTM with a learned initial state, tied head, next-token loss."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.start = nn.Parameter(torch.zeros(2, 1, 12))
        self.rnn = nn.LSTM(12, 12, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(12, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        start = self.start.expand(-1, tokens.shape[0], -1).contiguous()
        y, _ = self.rnn(self.words(tokens), (start, start))
        logits = self.head(y)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class EinsumAttention(nn.Module):
    """Attention written with einsum, finfo.min masking and a learned relative bias."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, WIDTH, heads, WIDTH // heads) * 0.2)
        self.bias = nn.Parameter(torch.zeros(heads, LENGTH, LENGTH))
        self.out = nn.Parameter(torch.randn(heads, WIDTH // heads, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("bld,tdhe->tbhle", x, self.qkv)
        scores = torch.einsum("bhqe,bhke->bhqk", q, k) * q.shape[-1] ** -0.5 + self.bias
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        return torch.einsum("bhqk,bhke,hed->bqd", scores.softmax(-1), v, self.out)


class RotaryBlock(nn.Module):
    """Rotary positions, grouped-query SDPA, RMS norm and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.down = nn.Linear(32, WIDTH)
        self.register_buffer("frequency", 100.0 ** -torch.linspace(0, 1, 2))

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2])[:, None] * self.frequency
        a, b = x.chunk(2, -1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q = self.rotate(self.q(y).unflatten(-1, (4, 4)).transpose(1, 2))
        k, v = self.kv(y).unflatten(-1, (4, 4)).transpose(1, 2).chunk(2, 1)
        y = F.scaled_dot_product_attention(q, self.rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + y.transpose(1, 2).flatten(2)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with weights returned, key padding and a float mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **options)
        self.causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        padding = torch.zeros(x.shape[:2])
        padding[:, -1] = -1e4
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=self.causal)


class TinyGPT(nn.Module):
    """Decoder-only language model with tied head, causal SDPA, learned positions."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(RotaryBlock() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        labels = tokens if labels is None else labels
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits, "cache": None}


class Seq2Seq(nn.Module):
    """nn.Transformer with masks of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Transformer(WIDTH, 4, 1, 1, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        padding = source == 0
        y = self.body(
            self.words(source), self.words(target), tgt_mask=mask, src_key_padding_mask=padding
        )
        return self.head(y)


def encoder(*, norm_first: bool) -> nn.Module:
    """Return torch's own encoder of two layers."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 32, dropout=0.1, batch_first=True, norm_first=norm_first, activation="gelu"
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _packed(batch: int) -> Call:
    lengths = torch.tensor([LENGTH, LENGTH - 2, LENGTH - 3][:batch])
    return call(pack_padded_sequence(torch.randn(batch, LENGTH, WIDTH), lengths, batch_first=True))


def _ragged(batch: int) -> Call:
    return call(torch.randn(batch, LENGTH, WIDTH), torch.tensor([LENGTH - 3, LENGTH, 2][:batch]))


def _two_sequences(batch: int) -> Call:
    return call(*(torch.randint(1, WORDS, (batch, LENGTH)) for _ in range(2)))


def _recurrent(name: str, kind: type[nn.RNNBase], **options: Any) -> Case:
    return Case(name, lambda: Recurrent(kind, **options), steps)


CASES = (
    quick(_recurrent("lstm", nn.LSTM)),
    _recurrent("lstm-deep-bidirectional", nn.LSTM, num_layers=2, bidirectional=True, dropout=0.3),
    _recurrent("lstm-projection", nn.LSTM, proj_size=6),
    _recurrent("gru", nn.GRU),
    _recurrent("gru-deep-bidirectional", nn.GRU, num_layers=2, bidirectional=True, dropout=0.3),
    _recurrent("rnn-relu", nn.RNN, nonlinearity="relu", num_layers=2),
    quick(Case("rnn-cells", CellLoop, steps)),
    Case("lstm-packed", PackedLSTM, _ragged),
    Case("gru-takes-packed", TakesPacked, _packed, second_batch=None),
    Case("char-lstm-tied", CharLSTM, tokens),
    quick(Case("einsum-attention", EinsumAttention, steps)),
    quick(Case("rotary-block", RotaryBlock, steps)),
    Case("multihead-attention", SelfAttention, steps),
    Case("multihead-attention-dropout", lambda: SelfAttention(dropout=0.2, bias=False), steps),
    quick(Case("tiny-gpt", TinyGPT, tokens)),
    Case("transformer", Seq2Seq, _two_sequences),
    Case("encoder-post-norm", lambda: encoder(norm_first=False), steps),
    Case("encoder-pre-norm", lambda: encoder(norm_first=True), steps),
)
