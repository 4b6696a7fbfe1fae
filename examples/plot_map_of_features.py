"""
===============================
Visualize images without labels
===============================

Similar images have similar features, so a two-dimensional embedding of the features
shows groups, outliers and duplicates before any image is labelled. This example uses
:class:`~sklearn.manifold.TSNE`; UMAP can be used in the same way.
"""

# %%
# The colors show the digits, which the embedding does not use.
import matplotlib.pyplot as plt
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score

from sktl import PretrainedFeatures

X, y = load_digits(return_X_y=True)
X, y = X[:1000].reshape(-1, 8, 8), y[:1000]
features = PretrainedFeatures(
    "resnet_mini", layer="stage2", pooling=4, pixel_range=(0, 16), image_size=32
)
tables = {"pixels": X.reshape(len(X), -1), "features": features.fit_transform(X)}

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
for ax, (name, table) in zip(axes, tables.items(), strict=True):
    embedding = TSNE(random_state=0).fit_transform(table)
    points = ax.scatter(*embedding.T, c=y, cmap="tab10", s=8)
    ax.set(title=name, xticks=[], yticks=[])
fig.colorbar(points, ax=axes, ticks=range(10), label="digit")
plt.show()

# %%
# Clusters compared with the labels by the adjusted Rand index (1 is perfect, 0 is
# chance):
for name, table in tables.items():
    clusters = KMeans(10, n_init=10, random_state=0).fit_predict(table)
    print(f"{name}: {adjusted_rand_score(y, clusters):.2f}")
