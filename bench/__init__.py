"""The microbenchmark suite: one timing function, one statistic, real peers, and a roofline measured on the machine at hand.

    python -m bench attention --backend cpu,sdpa --cases A/llama8b --dtype bfloat16 --json FILE

cases -> inputs -> correctness check -> interleaved timing -> rows -> report
"""
