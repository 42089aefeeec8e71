"""What tgrl.py needs of a GPU's memory, counted without a GPU; and what it takes to put a group into one row.

    python .compare/memory.py                      3B and 7B, on 1 to 8 cards: some six minutes on a CPU
    python .compare/memory.py --model 3B --world 2 8 --tokens 2048

Layers, FSDP and checkpointing are the real ones; tensors are fake: they have a size but no content. A group:
a prompt of 1500 tokens, 1444 of them a picture, and 8 answers. Not counted: CUDA, NCCL, fragmentation.
"""

import argparse
import gc
import itertools
import math
import os
import weakref
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there is a GPU, leave it alone

import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import flop_registry
from transformers.vision_utils import get_vision_window_index

import bench
import tgrl

PROMPT, SIDE, ANSWERS = 1500, 38, 8  # tokens; tokens along an edge of the picture; answers of the group
ATEN, GIB = torch.ops.aten, 2**30


class Card(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees each operation; adds up the bytes of living fake tensors, and FLOPs as torch's counter does."""

    sizes, now, peak, flops, answer_tokens = {}, 0, 0, 0, 0  # sizes: of storages, by address

    def see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key], self.peak = size, max(self.peak, self.now)

    def forget(self, key: int):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if distributed.tensor.DTensor in kinds:
            return NotImplemented  # it comes again, as what this card does of it
        # Real are numbers that code looks at, as the grids of pictures; and the policy while it is on meta.
        if FakeTensor not in kinds and (str(kwargs.get("device")) != "cpu" or "arange" in str(op)):
            with unset_fake_temporarily():
                return op(*args, **kwargs)
        # Two sizes depend on content: x[mask] has a row for each answer token; a gradient is as its source.
        if op is ATEN.index.Tensor and getattr(args[1][0], "dtype", None) == torch.bool:
            args = args[0].flatten(0, 1), [torch.empty(self.answer_tokens, dtype=torch.long, device="cpu")]
        if op is ATEN.masked_scatter_backward.default:
            op, args = ATEN.new_empty.default, (args[0], args[2])
        result = op(*args, **kwargs)
        if count := flop_registry.get(op._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, FakeTensor):
                self.see(x.untyped_storage())
        return result


def resize(storage, size: int, plainly=torch.UntypedStorage.resize_):
    plainly(storage, size)  # FSDP frees gathered weights by it, and it is no operation that a mode sees
    card.see(storage)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, scale=None, is_causal=False):
    """scaled_dot_product_attention as a GPU does it where there is a mask; a CPU has another kernel."""
    if attn_mask is not None:  # it becomes numbers, in rows of a multiple of 16
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -math.inf)
        bias = nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]
        attn_mask = bias.expand(*q.shape[:3], -1)
    how = attn_mask, torch.is_grad_enabled(), dropout_p, is_causal
    return ATEN._scaled_dot_product_efficient_attention(q, k, v, *how, scale=scale)[0]


card = Card()
torch.UntypedStorage.resize_, nn.functional.scaled_dot_product_attention = resize, attention


def make_batch(tokens: int, cost_ratio: float) -> SimpleNamespace:
    with unset_fake_temporarily():
        ids, grid = torch.full((PROMPT,), 10), torch.tensor([[1, 2 * SIDE, 2 * SIDE]])
        prompt = tgrl.Prompt(ids, ids[:, None].expand(-1, 3), torch.zeros(4 * SIDE**2, 1176), grid)
        answers = [tgrl.Trajectory([10] * tokens, "", 0.0) for _ in range(ANSWERS)]
        batch = SimpleNamespace(**tgrl.pack([tgrl.Group(None, prompt, answers)], cost_ratio)._asdict())
        # The vision tower is told ten of its windows as one: as many bytes, 1 % more FLOPs, in half the time.
        places, ends = get_vision_window_index(batch.vision["image_grid_thw"], 2, 112, 14)
        batch.vision.update(window_index=places, cu_window_seqlens=torch.cat([ends[:-1:10], ends[-1:]]))
    batch.vision["pixel_values"] = torch.empty_like(batch.vision["pixel_values"], device="cpu")  # fake
    vars(batch).update(
        (k, torch.empty_like(x, device="cpu")) for k, x in vars(batch).items() if k != "vision"
    )
    return batch


def measure(policy: tgrl.Policy, optimizer, tokens: int, cost_ratio: float) -> tuple:
    """-> rows; bytes at the peaks of scoring, of forward and backward, of the step; FLOPs of the second."""
    batch, card.answer_tokens, card.peak = make_batch(tokens, cost_ratio), ANSWERS * tokens, card.now
    with torch.no_grad():
        policy.eval()(batch)
    peaks, card.peak, card.flops = [card.peak], card.now, 0
    policy.train()(batch).sum().backward()  # for the loss, which has but a few [N, T]
    peaks, card.peak = [*peaks, card.peak], card.now
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return len(batch.ids), [*peaks, card.peak], card.flops


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--model", type=str.upper, nargs="+", default=["3B", "7B"], choices=bench.REAL)
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4, 8], help="cards")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="of an answer")
    o = parser.parse_args()
    print("GiB a card     answers  rows   actor  policy moments scoring  update    step    most  TFLOP")
    for name, world in itertools.product(o.model, o.world):
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        with FakeTensorMode(allow_non_fake_inputs=True), card:
            actor, processor = bench.build(name, torch.bfloat16)
            held = [card.now]
            policy = tgrl.make_policy(actor, tgrl.Encoder(processor, actor, tgrl.Options()).unwritable)
            held.append(card.now - sum(held))
            policy.model.activation_checkpointing_enable()
            optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
            measure(policy, optimizer, 1, math.inf)  # makes the moments; DTensor plans with whole stand-ins
            held.append(card.now - sum(held))
            limits = [policy.cost_ratio] + [math.inf] * (world == o.world[-1])  # inf: one row, however long
            for tokens, limit in itertools.product(o.tokens, limits):
                rows, peaks, flops = measure(policy, optimizer, tokens, limit)
                gib = [f"{x / GIB:7.2f}" for x in (*held, *peaks, max(peaks))]
                what = f"{name} x {world} cards  {ANSWERS} x {tokens:4}  {rows:4}"
                print(what, *gib, f"{flops / 1e12:6.0f}", flush=True)
        del actor, policy, optimizer
        distributed.destroy_process_group()
        gc.collect()


if __name__ == "__main__":
    main()
