"""
=====================================
Loss curves: how deep, and how fast
=====================================

Fine-tuning has two questions, how many stages to train and at which rate. The curves of
``loss_curve_`` show at a glance when a rate is too low to arrive, or so high that the
first steps destroy what was pretrained.
"""

# %%
# A rate is tried on one split with some epochs, on each of two depths. A ``memory``
# computes the frozen stages once for all of them.
import tempfile

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import ParameterGrid, train_test_split

from sktl import FineTunedCNNClassifier

X, y = load_digits(return_X_y=True)
X = X.reshape(-1, 8, 8)
X_train, X_test, y_train, y_test = train_test_split(
    X, y, train_size=300, test_size=500, stratify=y, random_state=0
)
memory = tempfile.TemporaryDirectory()
grid = ParameterGrid({"trainable": [1, 3], "lr": [1e-4, 1e-3, 1e-2]})
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
# The learning rate follows a cosine to zero, so that curves end flat.
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for parameters, classifier in zip(grid, fitted, strict=True):
    ax = axes[0 if parameters["trainable"] == 1 else 1]
    curve = classifier.loss_curve_
    ax.plot(range(1, len(curve) + 1), curve, marker="o", label=f"lr={parameters['lr']}")
for ax, title in zip(axes, ("the last stage", "the last three stages"), strict=True):
    ax.set(title=title, xlabel="epoch", yscale="log")
    ax.legend()
axes[0].set_ylabel("training loss")
plt.show()

# %%
# All of it can stand in a ``GridSearchCV`` as well; see
# :ref:`the recipe <tuning-depth-and-rate>`. The accuracy on other images decides, not
# the loss on those that were learned.
