"""
==============================================
Plot loss curves for depths and learning rates
==============================================

Fine-tuning has two main parameters, the number of trainable stages and the learning
rate. ``loss_curve_`` shows whether a learning rate is too low to converge, or so high
that the first steps destroy the pretrained features.
"""

# %%
# Each learning rate is tried on one split for a few epochs, with two depths. By default
# ``fit`` selects the learning rate, and initializes the head with a linear probe, whose
# loss is low before the first epoch. Here the learning rate is set, and the head is
# random, so that all curves start at the same loss. With ``memory`` the output of the
# frozen stages is computed once for all of them.
import tempfile

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import ParameterGrid, train_test_split

from sktl import FineTunedCNNClassifier

X, y = load_digits(return_X_y=True)
X = X.reshape(-1, 8, 8)
X_train, X_test, y_train, y_test = train_test_split(
    X, y, train_size=200, test_size=500, stratify=y, random_state=0
)
memory = tempfile.TemporaryDirectory()
grid = ParameterGrid({"trainable": [1, 2], "lr": [1e-4, 1e-3, 1e-2]})
fitted = []
for parameters in grid:
    classifier = FineTunedCNNClassifier(
        "resnet_mini",
        pixel_range=(0, 16),
        image_size=32,
        head_init="random",
        max_epochs=8,
        memory=memory.name,
        random_state=0,
        **parameters,
    )
    fitted.append(classifier.fit(X_train, y_train))
    score = classifier.score(X_test, y_test)
    print(f"{parameters}: accuracy {score:.3f}")
memory.cleanup()

# %%
# The scheduler increases the learning rate in the first three tenths of the steps, and
# then decreases it to zero, so the curves flatten at the end.
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for parameters, classifier in zip(grid, fitted, strict=True):
    ax = axes[0 if parameters["trainable"] == 1 else 1]
    curve = classifier.loss_curve_
    ax.plot(range(1, len(curve) + 1), curve, marker="o", label=f"lr={parameters['lr']}")
for ax, title in zip(axes, ("the last stage", "the last two stages"), strict=True):
    ax.set(title=title, xlabel="epoch", yscale="log")
    ax.legend()
axes[0].set_ylabel("training loss")
plt.show()

# %%
# The training loss does not show which settings are best. By default the learning rate
# is selected on held-out images. All parameters can be searched by ``GridSearchCV``,
# see :ref:`the recipe <tuning-depth-and-rate>`.
