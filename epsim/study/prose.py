"""The words of docs/specialise.md that do not depend on any figure."""

HEADER = """# Specialised experts, trained small

What the training methods of SMoES, SMAR, MoIIE and hard routing do to the routing of a small vision-language model, and
what that routing does to transfers and times, beside the figures that SMoES ({citation}) prints for
OLMoE. `{command}` wrote this page and its figures; edit nothing here by hand.

- **Reproduced, at this size: structure.** How far experts specialise under each method, where in the model, how this
  comes about in training, and what then crosses between two devices.
- **Not to be had at this size: accuracy.** Models of some million parameters that answer questions about digits say
  nothing of the accuracies that the paper measures on public benchmarks, and none is claimed.
- **Simulated: times.** No figure of a device was measured here ([validation.md](validation.md))."""

MSI = """## Specialisation

MSI (SMoES eq. 19) and MRD distance (SMAR eq. 10, with 1e-6 added to every expert's share) of the routing of held-out
prompts, means over layers; formulas: [metrics.md](metrics.md). Paper: vision-language models on the pretrained OLMoE,
other data, other images. Hard routing has an MSI of 1, and MoIIE at least the share of its experts of one modality, by
construction, if every expert is used; idle experts, which no token of these prompts chose, count as 0.
Weights of the objectives are other ones than the paper's, since weights of the model start at random
([methods.md](methods.md)): compare orders, not values.

One value: `epsim trace stats {folder}/seed-0/attention.arrow`."""

EVOLUTION = """### In the course of training

The specialisation score of every expert (2 x text affiliation - 1; SMoES figures 7 and S5 to S9) in the stage in which
methods differ, from `experts.npz` of the first seed's runs, each point over the steps since the last.

![Specialisation of every expert in the course of training]({images}/specialise-evolution.png)"""

FUSION = """### How modalities fuse

Soft modality scores (0 vision, 1 text) of held-out prompts by layer, and token by token in one of them (SMoES figures
8 and S10 to S12), first seed. The first is of the model trained with that very score; the second is fitted to the
trace."""

ACCURACY = """## Accuracy: not reproduced

Share of held-out questions about scenes of digits that are answered exactly right; mean over seeds ± standard error
over seeds, and the standard error that the number of prompts alone makes, which more seeds do not bring down: all
answer the same prompts. Beside it stands the paper's change of mean accuracy against soft routing, over public
benchmarks. Neither says anything of the other: the questions are others, and
the paper's language benchmarks test knowledge that a model without pretraining does not have to lose.

One value: `results.json` of `epsim train {config}/attention.yaml --start {folder}/seed-0/soft -o DIR`."""

TRANSFER = """## Transfer ratios

As SMoES table S10: percent of routed pairs (without dedup) and of tokens (with dedup) that cross between two devices,
homes by modality; P prefill, D decode, V vision, T text. Baseline: soft routing with experts in their order
(contiguous). Modality bins are fitted to the very trace that is counted, as `epsim trace stats` says: with bins from
other prompts somewhat more would cross.

One row: `epsim trace stats {folder}/seed-0/attention.arrow --placement modality_bins`."""

TRANSFER_PAPER = """The paper's rows, range over its five benchmarks. Its baseline is below half in prefill vision and
in decode, and above it in prefill text: that belongs to its checkpoint, where experts in their order lean to one side;
there is no reason that models from random weights should have it."""

LOAD = """## Load of the devices

SMoES's bins balance the load within a bin, not between them: where a batch has more vision than text tokens, the device
of the vision experts has more to do. The paper does not report it. Percent of the routed pairs that the devices of
the vision and of the text experts serve, and the evenness (mean / maximum over devices, layers pooled), modality bins.

One row: `epsim trace stats {folder}/seed-0/attention.arrow --placement modality_bins`."""

TIMES = """## Simulated TTFT and TPOT

Scenario [{scenario}]({scenario_link}): layers of OLMoE's full size, as many as the small model has, with the small
model's routing; cluster `orin-2x-10gbe`, devices fitted to table S11, dedup per device, homes by modality. Every batch
size runs over all {requests} requests. Below the baseline's seconds stand changes against it, percent; the baseline is
soft routing, contiguous, sync, of the same seed. Seconds are those of few layers and short prompts, so that only
changes can be held against the paper's. "Bins, sync" is the share of the placement, "bins, async" that of placement and
transmission together; soft routing with bins and async shows what comes without any training for it.

One row: `epsim simulate {scenario} --set trace.path={folder}/seed-0/attention.arrow`, there over the first requests
alone."""

TIMES_PAPER = """The paper's (table S11, OLMoE on two Orins, attention-soft with bins and async against baseline):"""

LIMITS = """## What cannot be claimed

- **Accuracy**, as said above: neither that a method keeps it nor that it loses it.
- **The paper's values** of MSI, transfer and time. Those belong to a pretrained model, its data and its benchmarks.
  What is compared is order and sign.
- **Standard errors are over seeds of training.** The {requests} held-out prompts of the traces are the same for all
  models, so that a difference between methods is not one between prompts; what other prompts would change is not in the
  errors.
- **Weights of the objectives** were chosen at this size so that the methods act in so few steps. Other weights give
  other degrees of specialisation, as the paper's ablations of its weights show.
- **Times** are simulated, on devices fitted to the paper's own table S11: where they resemble the paper's, that is no
  evidence of its own."""

AGAIN = """## How to do it again

```sh
{command}
```

It goes on where it was interrupted, and runs nothing that is complete. All figures: `{folder}/study.json`."""
