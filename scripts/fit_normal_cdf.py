"""Fits the polynomial of `normal_cdf` in src/device/cpu/real.rs: -ln(erfc(a / sqrt 2)) / a over 0..6.

usage: fit_normal_cdf.py        (needs mpmath); prints the coefficients, highest power first, and the largest error.
"""
from mpmath import chebyfit, erfc, log, mp, mpf, nstr, pi, sqrt

mp.dps = 40


def log_tail(a):
    return -log(erfc(a / sqrt(2))) / a if a > mpf("1e-12") else sqrt(2 / pi)


coefficients, error = chebyfit(log_tail, [mpf(0), mpf(6)], 12, error=True)
print([nstr(c, 10) for c in coefficients], "largest error", nstr(error, 3))
