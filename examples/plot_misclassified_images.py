"""
=======================================
Which images does the model get wrong
=======================================

A score says how often a model is wrong, not why. The images do: each with what it was
taken for and how sure the model was. Often the label is at fault.
"""

# %%
# Predictions for images that were not learned from come from ``cross_val_predict``.
# ``layer`` and ``pooling`` are those that
# :ref:`a search <sphx_glr_auto_examples_plot_accuracy_and_labels.py>` finds for digits.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktl import PretrainedFeatures

X, y = load_digits(return_X_y=True)
X, y = X[:800].reshape(-1, 8, 8), y[:800]
features = PretrainedFeatures(
    "resnet_mini", layer="stage1", pooling=4, pixel_range=(0, 16), image_size=32
)
columns = features.fit_transform(X)
model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
probabilities = cross_val_predict(model, columns, y, cv=5, method="predict_proba")
predicted = np.unique(y)[probabilities.argmax(axis=1)]
wrong = np.flatnonzero(predicted != y)
print(f"accuracy {np.mean(predicted == y):.3f}, {len(wrong)} of {len(y)} wrong")

# %%
# The network is never trained, so its columns are computed once, before the folds, and
# nothing leaks. Those the model was most sure about come first.
wrong = wrong[np.argsort(-probabilities[wrong].max(axis=1))][:16]
fig, axes = plt.subplots(2, 8, figsize=(10, 3.2), layout="constrained")
for ax in axes.flat:
    ax.axis("off")
for ax, i in zip(axes.flat, wrong, strict=False):
    ax.imshow(X[i], cmap="gray_r")
    ax.set_title(
        f"{y[i]} taken for {predicted[i]}\n{probabilities[i].max():.0%} sure", size=8
    )
plt.show()

# %%
# And which classes are mixed up:
ConfusionMatrixDisplay.from_predictions(y, predicted, cmap="Blues", colorbar=False)
plt.show()
