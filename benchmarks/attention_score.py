"""Ways to carry the attention score, timed on the attention of one layer alone.

    python benchmarks/attention_score.py [--device cuda --dtype bfloat16 --tokens 2048]

What scores cost in a whole model is timed by capture_overhead.py. The ways to have a mean of the keys' scores beside
that of their values:
  plain     the model's own call, without scores; all ratios are to it
  +1        one more channel in V, sizes of Q, K and V unequal: flash attention does not take it
  equal     Q, K and V zero-padded to one size, a multiple of 8 (for latent attention V to the size of Q and K)
  separate  the model's own call and a second one, whose V is the scores and zeros
  epsim     what epsim does: as equal, but latent attention keeps Q and K (V goes to the next multiple of 8);
            for one query (decode) as separate

There is no kernel of our own in it. A Triton pass over Q K^T with an online softmax and only scores to mix would leave
the model's call as it is and do half of its multiplications again: it has to beat the smaller of the ratios of "equal"
and "separate", and is worth it only where that is well above 1.5. Times are medians, variants in turn.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from epsim.capture.scores.attention import attention_of_scores, attention_with_scores

SHAPES = {
    "MHA 16 x 128": (16, 16, 128, 128),
    "GQA 32/4 x 128": (32, 4, 128, 128),
    "MLA 16 x 192/128": (16, 16, 192, 128),
}
SCALING = 0.08


class Attention(nn.Module):
    """Stands for an attention module of transformers."""

    is_causal = True

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def medians_s(works: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median wall time of each work, called in turn, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 2):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def attention_works(shape: tuple[int, ...], queries: int, keys: int, like: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the ways to attend of one layer with `shape` = query heads, key heads, size of Q and K, size of V."""
    heads, kv_heads, size, value_size = shape
    module = Attention(heads // kv_heads)
    query, key = like.new_empty(1, heads, queries, size).normal_(), like.new_empty(1, kv_heads, keys, size).normal_()
    value, scores = like.new_empty(1, kv_heads, keys, value_size).normal_(), torch.rand(1, keys, device=like.device)
    own = (module, query, key, value)

    def plain() -> Tensor:
        return sdpa_attention_forward(*own, None, scaling=SCALING)[0]

    def one_more() -> Tensor:
        channel = scores.to(value.dtype)[:, None, :, None].expand(-1, kv_heads, -1, -1)
        return sdpa_attention_forward(module, query, key, torch.cat((value, channel), -1), None, scaling=SCALING)[0]

    def equal() -> Tensor:
        width = max(size, value_size + 1)
        width += -width % 8
        padded = F.pad(value, (0, width - value_size))
        padded[..., value_size] = scores[:, None].to(value.dtype)
        grown = (F.pad(tensor, (0, width - size)) for tensor in (query, key))
        return sdpa_attention_forward(module, *grown, padded, None, scaling=SCALING)[0]

    def separate() -> tuple[Tensor, Tensor]:
        return plain(), attention_of_scores(*own, scores, None, scaling=SCALING)

    def epsim() -> Any:
        return attention_with_scores(*own, scores, None, scaling=SCALING) if queries > 1 else separate()

    return {"plain": plain, "+1": one_more, "equal": equal, "separate": separate, "epsim": epsim}


def show(title: str, found: dict[str, float]) -> None:
    base = next(iter(found.values()))
    cells = (f"{name} {1e3 * value:.2f} ms ({value / base:.2f})" for name, value in found.items())
    print(f"{title:34} {', '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    )
    print(f"{where}, {args.threads} thread(s), torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{args.dtype}, {args.tokens} tokens, median of {args.repeats}; in brackets the ratio to the first")
    like = torch.empty(0, device=device, dtype=dtype)
    for name, shape in SHAPES.items():
        for what, queries in (("prefill", args.tokens), ("decode", 1)):
            works = attention_works(shape, queries, args.tokens, like)
            with torch.inference_mode():
                show(f"attention {what} {name}", medians_s(works, device, args.repeats))


if __name__ == "__main__":
    main()
