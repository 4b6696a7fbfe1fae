"""
=========================
Plot misclassified images
=========================

A score measures how often a model is wrong, but not why. This example plots the
misclassified images with the predicted class and its probability. Often the label is
wrong.
"""

# %%
# ``cross_val_predict`` predicts each image with a model that was not trained on it.
# ``layer`` and ``pooling`` are the result of
# :ref:`a search <sphx_glr_auto_examples_plot_accuracy_and_labels.py>` on digits.
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
print(f"accuracy {np.mean(predicted == y):.3f}, {len(wrong)} of {len(y)} images wrong")

# %%
# The network is not trained, so its features can be computed once before the
# cross-validation without leaking information. The images are sorted by the predicted
# probability.
wrong = wrong[np.argsort(-probabilities[wrong].max(axis=1))][:16]
fig, axes = plt.subplots(2, 8, figsize=(10, 3.2), layout="constrained")
for ax in axes.flat:
    ax.axis("off")
for ax, i in zip(axes.flat, wrong, strict=False):
    ax.imshow(X[i], cmap="gray_r")
    ax.set_title(
        f"true {y[i]}, predicted {predicted[i]}\n{probabilities[i].max():.0%}", size=8
    )
plt.show()

# %%
# The confusion matrix shows which classes are confused:
ConfusionMatrixDisplay.from_predictions(y, predicted, cmap="Blues", colorbar=False)
plt.show()
