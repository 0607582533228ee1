"""The words of docs/exchange.md that do not depend on any figure."""

HEADER = """# Validation: exchanges of DeepEP and NCCL

Times of dispatch and combine that others measured on 1 to 32 nodes of 8 GPUs, beside what epsim makes of the links'
specifications and two constants per library and kind of operation. `epsim validate exchange --docs docs/exchange.md`
wrote this page and its figure; edit nothing here by hand.

## Targets and what is reached

Errors are |predicted / published - 1|, their mean over rows that nothing was fitted to, all kinds of operation
together. No row is left out of a figure. The second line was added with its held-out rows seen (below).
Dotted in the figure: 15 % off."""

MODEL = """## The model

    time = latency + latency of the route + max(NVLink's time / share, the network's time / share)

**From the specification**: how long the busiest NVLink and the busiest link of the network are held, and the latency of
the route, as epsim's simulator gives them for the preset `h100-2x8` with as many nodes as needed (450 GB/s NVLink,
400 Gbit/s and 63 GB/s PCIe per GPU; NVLink of A100 300 GB/s, of H800 200 GB/s, by their data sheets). Bytes as
everywhere in epsim: FP8 with a scale per 128 values and 8 bytes per pair on the way out, BF16 on the way back. When
messages are cut finely, epsim's event engine ends when the busiest link does (tests hold both together); DeepEP sends
single vectors.

- **Low latency**: a vector per (token, expert), over NVLink inside the node, over the GPU's own NIC elsewhere.
- **Normal**: a vector per (token, node) over the network to the GPU with the sender's index, from there and inside the
  node a vector per (token, device) over NVLink (`dedup: node`).
- **NCCL**: all-to-all straight; the others around a ring, n - 1 steps, all-reduce twice, a latency of the route per
  step: at best size x (n - 1) / n / rate, nccl-tests' bus bandwidth.

**Routing** is drawn as DeepEP's tests draw it: uniform without replacement; in normal mode over more than four nodes
from the experts of the four nodes with the best scores. What a device gets varies, and the exchange ends with the
busiest: at 8 nodes and 128 tokens that is some 7 % more than the mean, at 8 tokens a third. Loads are the mean of
four draws with fixed seeds; above 512 tokens per rank they are taken as even. The low-latency test of that time masks
ten picks per rank, which leaves 2.1 of 8 picks of a single token; its published bandwidths show it. Rows with 288
experts on 64 GPUs (4.5 each, which DeepEP's test refuses) are taken as even.

**Two constants**, fitted by least squares of relative errors to the rows named, and to no others: the *latency*
without any byte, and the *share* of NVLink's specified rate that the kernels reach. In normal mode SMs do the copying:
the share is that of 20 SMs, in proportion for others, up to 1. The network has share 1, but for the study
`low-latency-network`, where the network's share is fitted and NVLink has 1. Where a table has one row to fit (DeepEP
V1), the latency comes from another table and only the share is fitted; where all goes over RDMA no share has a part."""

TABLES = """## What the tables are

- `low-latency`, `normal`: ai-dynamo/aiconfigurator (Apache-2.0), for SGLang 0.5.0, from DeepEP's own tests at hidden
  7168, top-8. The device says H200 (normal on one node: H100); it is a constant in the collector, so it is uncertain,
  and so are driver, fabric and DeepEP's version. Both have the same links. Network: assumed as in the preset, which
  the rows of two nodes confirm (fitted share of the network: see `low-latency-network`).
- `normal` has a time for the transfer (`transmit`), and one for the kernel before it that exchanges counts and waits
  for the other ranks (`notify`). On more than one node each is the time of a kernel; on one node the collector times
  the whole call and says 0 for notify. Predicted is the transfer; the error against the sum is shown too. Neither is
  quite what the rows of one node measure.
- `low-latency-0.5.12`: of the same source for SGLang 0.5.12, one node, other shapes, nothing masked.
- `v1-*`: DeepEP's `docs/legacy.md` (H800) and its first release. Its bandwidths of normal mode count the sender's own
  node (within a node: its own device) too; by this the times here follow from them.
- `nccl-*`: aiconfigurator's nccl-tests on one node, 2, 4 and 8 GPUs. Sizes in bytes, as nccl-tests counts them.

Not predicted, for want of a shape or of the network: pplx-kernels' table (its transports differ by a factor of 7 at
the same size, shape not stated), users' reports of bandwidths in DeepEP's issues (tokens not stated; 13 to 30 GB/s
where V1's table has 43 to 58)."""

READING = """## What the errors say

- **The network runs at its specification.** Fitted to two nodes, its share is 1 within 2 %, and four and eight nodes
  follow. Fitted to one node only, predictions for more nodes are too short by 3 to 12 us in the median: the floor of an
  exchange over the network is above that of NVLink by more than the specified 2.2 us, and grows with the nodes. Rows of
  up to 32 tokens, which are mostly latency, make the error.
- **Normal, two nodes**, from 1024 tokens on: dispatch 10 to 46 %, combine 23 to 44 % too short. Kernels rather than
  links are the limit there: passing tokens on costs SMs more than sending within a node, which is all that the fit has
  seen.
- **Normal, four nodes** at 16 SMs and more: 6 to 14 % in the mean.
- **Normal, eight nodes**: from 1024 tokens on dispatch takes 1.8 to 3 times as long as predicted from the NICs, with
  any number of SMs, and combine of 4096 tokens at 8 SMs and more waits another 6 to 8 ms in notify. DeepEP's own EP64
  (51 GB/s, `v1-normal`, 9 to 11 % off here) and the low-latency rows on eight nodes of the same source show that this
  is no limit of the links: something of that cluster or run that no specification holds.
- **Notify** is not in the model: it waits for ranks and goes over all of them. Against transmit + notify small
  exchanges come out at half and less.
- **Few experts per device** (low latency, other shapes): with 1 or 2 experts per device dispatch is up to 8 times as
  slow as predicted, 30 to 40 % in the mean: few of its warps have work, since a group of them serves each expert. With
  384 experts and more it is 15 to 20 % slower: there is a message of counts for each.
- **NCCL** changes protocol and channels with size: between 32 KiB and 4 MiB it is slower than a line through
  both ends, above it 8 GPUs reach a larger share than 2. Two constants cannot follow that: fitted to *all* rows, with
  none held out, this form still has a mean error of {nccl_floor:.1f} %."""

CHOICES = """## What was chosen after seeing what

- Before any fit: the form (a latency, a share), which rows to fit (one node; 2 GPUs, half; one shape), bytes, `dedup`.
- After seeing held-out rows of low latency: loads of a draw instead of even ones (errors with even ones: dispatch 18 %,
  combine 25 %), which is how epsim simulates in any case. A sum of NVLink's and the network's time instead of the
  longer one would have had 12 and 14 %; it was not taken, since epsim's links run side by side.
- After seeing the rows of normal mode: that the share goes with the SMs (before fitting it), and that the headline is
  the transfer without notify; with notify it is worse, see the table.
- `low-latency-network` was added when it was clear what the first fit lacks. Its held-out rows had been seen.
- NCCL: fits to the 2-GPU rows of both types, and of logarithms, were tried too (16 to 24 % per operation); kept is the
  fit that DeepEP's rows have.
- The masked picks, DeepEP's way of counting and the four nodes come from the source of its tests, not from fits."""

AGAIN = """## How to do it again

```sh
epsim validate exchange                          # tables on the screen
epsim validate exchange --cells                  # every row too
epsim validate exchange --json                   # all values
epsim validate exchange --docs docs/exchange.md  # this page and its figure
```

It takes some 20 seconds. All data is in the package (`epsim/validate/data/exchange-*`), with its sources."""
