"""Philox4x32-10 in pure Python, and dropout masks made with it: part D of golden_encoder.py.

A mask: the key is the run's 64-bit seed, low half first. Call `block` gives eight 16-bit draws, low half of each word
first, for the elements (or key positions) 8 block .. 8 block + 7. Its counter is (block; head * 2^16 + position;
index * 2^12 + layer * 2^4 + site; step). An element is kept where its draw >= cut = round(65536 p), and is then scaled
by 65536 / (65536 - cut). Sites: 0 embeddings, 1 attention probabilities, 2 attention output, 3 output, 4 pooled.
"""

MASK32 = 0xFFFFFFFF


def philox4x32_10(counter, key):
    """Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & MASK32,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


PUBLISHED = [  # the known answers that Random123 ships: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
OWN = [([1, 2, 3, 4], [5, 6]), ([0, 0, 0, 1], [0, 1]), ([MASK32, 0, MASK32, 0], [0, MASK32])]
MASKS = [  # seed, step, index, layer, site, head, position, p, n. The head is 0 where a site has none.
    dict(seed=0, step=0, index=0, layer=0, site=0, head=0, position=0, p=0.1, n=32),
    dict(seed=42, step=7, index=3, layer=1, site=1, head=3, position=5, p=0.1, n=19),
    dict(seed=0xFEDCBA9876543210, step=4294967295, index=1048575, layer=11, site=2, head=0, position=127, p=0.25, n=24),
    dict(seed=1 << 32, step=100, index=15, layer=255, site=3, head=0, position=511, p=0.5, n=16),
    dict(seed=123456789, step=1, index=9, layer=0, site=4, head=0, position=0, p=0.1, n=40),
    dict(seed=5, step=2, index=1, layer=23, site=1, head=15, position=511, p=0.0, n=8),
]


def mask(m):
    cut = round(65536 * m["p"])
    key = [m["seed"] & MASK32, m["seed"] >> 32]
    counters = [
        [block, m["head"] << 16 | m["position"], m["index"] << 12 | m["layer"] << 4 | m["site"], m["step"]]
        for block in range((m["n"] + 7) // 8)
    ]
    halves = [half for c in counters for word in philox4x32_10(c, key) for half in (word & 0xFFFF, word >> 16)]
    draws = halves[: m["n"]]
    return {
        **m, "cut": cut, "scale": 65536 / (65536 - cut), "counters": counters, "draws": draws,
        "keep": [int(draw >= cut) for draw in draws],
    }  # fmt: skip


def answers_and_masks():
    """What goes into philox.json; the published answers are checked first."""
    answers = []
    for counter, key, output in PUBLISHED:
        counter, key, output = ([int(word, 16) for word in words.split()] for words in (counter, key, output))
        assert philox4x32_10(counter, key) == output, "the published known answers do not hold"
        answers.append({"counter": counter, "key": key, "output": output, "published": True})
    for counter, key in OWN:
        answers.append({"counter": counter, "key": key, "output": philox4x32_10(counter, key), "published": False})
    return {"known_answers": answers, "masks": [mask(m) for m in MASKS]}
