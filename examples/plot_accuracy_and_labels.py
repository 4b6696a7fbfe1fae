"""
=========================================
Few labels: which strategy, at which cost
=========================================

Labels are what is scarce. Here a network that has only seen photographs meets scanned
digits, with 3, 10 and 30 labels for each, in the three ways: as it is, as a fixed
feature extractor, and fine-tuned. Beside them stand what needs no network (raw pixels)
and what needs no pretraining (the same network from random weights).

The candidates are those of ``three_strategies.py``, which takes a folder of your own
images as well.
"""

# %%
# The digits have 8 x 8 values from 0 (black) to 16 (white): ``pixel_range`` says so.
# ``memory`` lets folds and candidates share what was computed.
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.datasets import load_digits
from three_strategies import splits, strategies

X, y = load_digits(return_X_y=True)
X = X.reshape(-1, 8, 8)
memory = tempfile.TemporaryDirectory()
candidates = strategies(
    {
        "backbone": "resnet_mini",
        "pixel_range": (0, 16),
        "image_size": 32,
        "batch_size": 64,
        "memory": memory.name,
    }
)

# %%
# Each is fitted on the same draws, and scored on the same 500 others.
rows = []
for n_labels in (3, 10, 30):
    for train, test in splits(y, n_labels, n_repeats=2, n_test=500):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            fitted = clone(candidate).fit(X[train], y[train])
            seconds = time.perf_counter() - start
            accuracy = fitted.score(X[test], y[test])
            rows.append((n_labels, name, accuracy, seconds))
memory.cleanup()
columns = ["labels per class", "strategy", "accuracy", "seconds"]
results = pd.DataFrame(rows, columns=columns)
means = results.groupby(["strategy", "labels per class"]).mean().unstack()
print(means.round(3).loc[list(candidates)])

# %%
# On images this far from photographs, what the network calls them is of little use,
# and its last features are no better than pixels. A lower stage, with averages over a
# grid that keep where things are, is far ahead with 3 labels, and the search finds it
# in seconds. With 10 and more, fine-tuning is as good, and takes several times as long.
# Without pretrained weights it needs far more labels.
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
for name in candidates:
    of_mine = means.loc[name]
    left.plot(of_mine["accuracy"], marker="o", label=name)
    right.plot(of_mine["seconds"], of_mine["accuracy"], marker="o")
left.set(xlabel="labels per class", ylabel="accuracy", xscale="log")
left.set_xticks([3, 10, 30], ["3", "10", "30"])
left.minorticks_off()
right.set(xlabel="seconds of a fit", xscale="log", ylim=left.get_ylim())
fig.legend(loc="outside lower center", ncols=2)
plt.show()

# %%
# With 10 labels, one candidate against the other:
ten = results[results["labels per class"] == 10].groupby("strategy")["accuracy"]
best = ten.mean().idxmax()
print(f"Best with 10 labels: {best}, {np.max(ten.mean()):.3f}")
