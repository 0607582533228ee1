"""epsim: predict TTFT and TPOT of Mixture-of-Experts models under expert parallelism, from routing traces."""

__version__ = "0.1.0"
