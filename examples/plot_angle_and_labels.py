"""
==========================================
Predict angles, and several labels at once
==========================================

``FineTunedCNNRegressor`` predicts numbers. ``FineTunedCNNClassifier`` learns several
labels per image from an indicator matrix. Both are shown on scanned digits.
"""

# %%
# Each digit is rotated by a random angle, which is the number to predict. The network
# is the one that is bundled with sktl.
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, mean_absolute_error

from sktl import FineTunedCNNClassifier, FineTunedCNNRegressor

digits = load_digits()
scans, number = 15 * digits.images[:350].astype("uint8"), digits.target[:350]
angles = np.random.default_rng(0).uniform(-45, 45, size=len(scans))
X = [
    Image.fromarray(scan).resize((32, 32)).rotate(angle)
    for scan, angle in zip(scans, angles, strict=True)
]
train, test = slice(0, 250), slice(250, None)

# %%
# With ``max_epochs=0``, the network stays as it is, and a ridge regression predicts the
# angle from its features. Training the two highest stages reduces the error. ``lr`` and
# ``wise_ft_alpha`` are set, so that nothing is selected, which takes less time.
memory = tempfile.TemporaryDirectory()
settings = {
    "backbone": "resnet_mini",
    "lr": 1e-3,
    "wise_ft_alpha": 1.0,
    "memory": memory.name,
    "random_state": 0,
}
fig, axes = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
for ax, max_epochs in zip(axes, [0, 3], strict=True):
    regressor = FineTunedCNNRegressor(trainable=2, max_epochs=max_epochs, **settings)
    predicted = regressor.fit(X[train], angles[train]).predict(X[test])
    error = mean_absolute_error(angles[test], predicted)
    print(f"{max_epochs} epochs: mean absolute error {error:.1f} degrees")
    ax.plot([-45, 45], [-45, 45], color="0.8", zorder=0)
    ax.scatter(angles[test], predicted, s=8)
    ax.set(title=f"{max_epochs} epochs, error {error:.1f}°", xlabel="angle")
axes[0].set_ylabel("predicted angle")
plt.show()

# %%
# Several labels are the columns of a matrix. One network learns all of them, and its
# probabilities are independent of each other: their rows do not sum to 1.
names = ["even", "at least 5", "a 7"]
labels = np.column_stack([number % 2 == 0, number >= 5, number == 7]).astype(int)
classifier = FineTunedCNNClassifier(trainable=1, max_epochs=2, **settings)
classifier.fit(X[train], labels[train])
proba = classifier.predict_proba(X[test])
precisions = average_precision_score(labels[test], proba, average=None)
for name, precision in zip(names, precisions, strict=True):
    print(f"{name}: average precision {precision:.2f}")
memory.cleanup()
