"""OVERALL as the tables of JANUS and ELMER have it. JANUS cuts its own rows where others are rounded, hence 0.011."""

import pytest

from finetune.scores.base import Result
from finetune.scores.overall import PARTS, combine

# JANUS, Tables 2 and 8: ROUGE-1, -2, -L, OVERALL.
XSUM = """
30.66 10.80 24.48 21.98
39.89 17.12 32.07 29.69
41.09 18.37 33.22 30.89
38.79 16.16 30.61 28.52
41.22 17.98 32.69 30.63
41.29 18.16 32.78 30.74
34.71 11.71 29.16 25.19
32.59 8.98 27.41 22.99
33.29 9.74 28.21 23.74
38.05 13.50 31.18 27.57
40.65 16.56 32.86 30.02
41.53 17.72 33.40 30.88
31.55 8.47 26.95 22.32
32.47 8.97 27.60 23.01
33.29 9.74 28.21 23.74
"""
# JANUS, Tables 4 and 7: ROUGE-L, BLEU-4, METEOR, OVERALL.
SQUAD = """
29.43 4.61 9.86 14.63
48.00 19.58 23.94 30.51
49.32 21.40 24.25 31.66
42.55 17.08 23.19 27.61
43.02 17.57 23.52 28.03
44.70 17.36 24.07 28.71
47.39 17.62 21.69 28.90
44.07 12.75 18.99 25.27
44.99 11.18 17.89 24.68
47.18 14.35 20.14 27.22
47.91 16.38 21.36 28.55
48.00 16.87 21.58 28.81
42.45 8.92 16.42 22.59
41.93 9.01 16.86 22.60
44.99 11.18 17.89 24.68
"""
# JANUS, Table 5, and ELMER, Table 2: BLEU-1, BLEU-2, Distinct-1, Distinct-2, OVERALL.
PERSONACHAT = """
41.56 32.95 0.3 0.8 18.90
46.00 38.40 1.3 7.3 23.25
45.77 35.54 1.4 8.4 22.78
47.60 39.36 1.1 6.1 23.54
50.33 40.11 1.2 7.3 24.73
51.16 40.32 1.2 7.2 24.97
39.82 30.72 1.9 14.2 21.66
31.11 23.90 2.5 22.7 20.05
36.16 34.37 2.4 17.8 22.68
42.76 37.36 2.1 16.4 24.65
44.68 37.73 1.8 13.1 24.32
45.21 37.90 1.6 11.1 23.95
41.56 32.95 0.30 0.80 18.90
41.06 35.75 1.40 6.90 21.28
47.60 39.36 1.10 6.10 23.54
46.00 38.40 1.30 7.30 23.25
12.63 9.43 0.10 0.30 5.62
41.17 32.13 0.10 1.10 18.63
44.38 35.18 0.10 0.80 20.12
24.89 18.94 0.10 0.60 11.13
39.82 30.72 1.90 14.20 21.66
31.53 24.17 0.10 0.80 14.15
30.56 23.38 0.10 0.70 13.69
31.44 24.06 0.10 0.60 14.05
26.92 20.47 0.00 0.40 11.95
31.11 23.90 2.50 22.70 20.05
29.43 21.89 1.56 21.45 18.58
31.45 23.99 3.66 24.96 21.02
"""


@pytest.mark.parametrize(
    ("name", "table", "rows"),
    [
        ("overall_xsum", XSUM, 15),
        ("overall_squad", SQUAD, 15),
        ("overall_squad_meteor15", SQUAD, 15),
        ("overall_personachat", PERSONACHAT, 28),
    ],
)
def test_every_row_of_the_papers(name: str, table: str, rows: int) -> None:
    lines = [[float(word) for word in line.split()] for line in table.strip().splitlines()]
    assert len(lines) == rows
    for *values, overall in lines:
        results = {part: Result(value, "nltk") for part, value in zip(PARTS[name], values, strict=True)}
        assert combine(name, results).value == pytest.approx(overall, abs=0.011), values
