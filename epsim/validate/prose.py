"""The words of docs/validation.md that do not depend on any figure."""

HEADER = """# Validation: SMoES's efficiency tables

Predictions beside published figures ({citation}): transfer ratios (table S10), times of an OLMoE vision-language
model on two Jetson Orins (S11), times of Qwen3-MoE on 16 GPUs (S12). `epsim validate published --docs
docs/validation.md` wrote this page and its figures; edit nothing here by hand.

- **Reproduced**: the structure of table S10: which share of tokens crosses, given how tokens choose experts.
- **Fitted**: table S11 (12 parameters of the device and the link to 48 values) and S12 (a line). A small error in
  sample says that the model's terms can take the form of the data; what a prediction is worth, the held-out rows say.
- **Not to be predicted by anybody**: absolute times from data sheets. See the last section but one."""

TARGETS_TEXT = """## Targets and what is reached

Mean errors are means of |predicted / published - 1| over the predicted rows; speed-ups are 100 x (SMoES / baseline -
1), their errors are in points, predicted minus published."""

REPRODUCED = """## Reproduced: table S10, transfer ratios

The synthetic traces of `trace.kind: published` are drawn so that tokens have remote experts as often as the columns
P_V, P_T and D_T say, so that small errors there are no discovery. What is tested is the rest of the way: modality
bins find the specialisation from loads alone, homes go by modality (prefill with the vision experts, decode with the
text experts; homes on both devices alike would make half of the pairs remote in every column), pairs and tokens are
counted as the paper counts them, and the token mix gives the columns P_V+T. No figure of a device enters.

![Simulated and published transfer ratios](images/validation-s10.png)"""

FITTED = """## Fitted: table S11, two Orins

Scenario: [scenarios/s11/orin-2x-olmoe.yaml](../scenarios/s11/orin-2x-olmoe.yaml); baseline: experts in their order,
synchronous; SMoES (attention-soft): modality bins, asynchronous; both with DeDup, homes by modality, KV caches moved
during the prefill. Fits: [calibration.md](calibration.md).

**What the held-out rows test.** They test the fitted values, not what was chosen beforehand with every row seen: the
terms of the model, the bounds, two images per MMMU request, the pair weight (3) and the loss scale (0.05). With a loss
scale of 0.1 the errors in sample are TTFT 8.4 %, TPOT 5.0 %, speed-ups 1.6 and 0.7 points, and TPOT just misses its
target of 5 %.

The **naive rule** knows no model: log-log interpolation (at the ends: extrapolation) in the batch size where the same
setting has other batch sizes among the fitted rows, else a copy of the fitted row that is most alike; in sample it
leaves each cell out. Where it does nearly as well as the simulator, the simulator's error is no evidence for the
simulator.

The **outlier** is TTFT of SQA-IMG at batch 1 (marked * below): at 1.49 s it is half of batch 2 (2.94 s) where MMMU
has 0.74 of it, and less than one decode step of batch 16 takes (2.10 s). No figure is without it unless it says so."""

INTERVALS = """The intervals are linearised: quick, but blind to kinks and to what lies further away. The residuals are
systematic (baseline and SMoES are off the same way in {same} of {pairs} pairs of cells), so that "95 %" is no coverage.
And the intervals know of noise alone: they do not know that the simulator leaves things out, so that a figure can be
determined sharply and still stand for something else ([calibration.md](calibration.md)). The fitted values are one way
to get the times of table S11, not measurements of an Orin."""

UNKNOWN = """## What nobody can predict from what was published

- **The workload of S11.** Token counts, images per request and output lengths are not given, only the mix of table
  S10 in whole percents. The mix of SQA-IMG (65:30:5) with one image of 576 tokens means 44 decode tokens per request,
  where the paper's accuracy protocol (supplement, 1.3) generates 20 at most: the mix and the protocol cannot both be
  those of S11.
- **Which Orin**, its clocks and power mode, and whether the network is a 10 GbE port on the module or a card: iperf3
  between two AGX Orin gives 1.7 to 3.4 Gbit/s on one driver, 9.41 is the line rate.
- **The software.** A decode step at batch 1 takes more than 50 times what data-sheet rates give (docs/simulator.md):
  the time is that of the host, of launches and of copies, which no data sheet holds.
- **S12's GPU**, network, workload and transfer ratios.
- **The parts.** Figure S1 is an image; times of attention, experts and transfers are not published as numbers.

The paper's figures that do not follow from each other:

{mismatches}"""

LIMITS = """## How to do it again

```sh
epsim validate published                            # tables on the screen
epsim validate published --json                     # all values
epsim validate published --docs docs/validation.md  # this page and its figures
epsim validate published --device DEVICE.yaml       # the fitted device, as shipped in epsim/presets/devices/
```

From the repository's root, since the scenarios are read from `scenarios/`. The same commands give the same page on
the same versions of numpy and scipy; other versions may move last digits of the fits."""
