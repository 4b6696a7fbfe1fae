"""
===================================
Keep the frames of a film together
===================================

Frames of one film are nearly equal. If some of them are held out to measure the quality
of a network, it recognizes the films, and the score says nothing about other films.
``groups`` keeps the frames of a film together.
"""

# %%
# Each film shows one place of a photograph, and the camera moves a little between its
# frames. A random half of the films has the label 1, so nothing can be learned about
# other films: a score that is much above 0.5 is wrong.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

from sktl import FineTunedCNNClassifier

photograph = load_sample_image("china.jpg")
rng = np.random.default_rng(0)
n_films, n_frames = 48, 6
places = np.array([(y, x) for y in range(4, 372, 64) for x in range(4, 568, 64)])
places = rng.permutation(places)[:n_films]
films = np.repeat(np.arange(n_films), n_frames)
corners = places[films] + rng.integers(-4, 5, size=(len(films), 2))
X = np.stack([photograph[y : y + 48, x : x + 48] for y, x in corners])
labels = films % 2  # the places are in random order

fig, axes = plt.subplots(2, 6, figsize=(8, 3), layout="constrained")
for row, film in zip(axes, [0, 1], strict=True):
    for ax, frame in zip(row, X[films == film], strict=False):
        ax.imshow(frame)
        ax.axis("off")
fig.suptitle("Frames of two films")
plt.show()

# %%
# Early stopping holds out a third of the first 32 films. The frames of the other
# films show how good the network is.
known = films < 32
scores = {}
for name, groups in {"without groups": None, "with groups": films[known]}.items():
    classifier = FineTunedCNNClassifier(
        "resnet_mini",
        trainable="head",
        lr=1e-3,
        max_epochs=3,
        early_stopping=True,
        validation_fraction=0.3,
        random_state=0,
    )
    classifier.fit(X[known], labels[known], groups=groups)
    best = classifier.history_[classifier.best_epoch_]["valid_score"]
    scores[name] = best, classifier.score(X[~known], labels[~known])
    print(f"{name}: {best:.2f} on the validation set, {scores[name][1]:.2f} elsewhere")

fig, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
for offset, label in ((-0.2, "validation set"), (0.2, "other films")):
    heights = [score[int(offset > 0)] for score in scores.values()]
    ax.bar(np.arange(2) + offset, heights, width=0.4, label=label)
ax.axhline(0.5, color="0.3", linestyle=":")
ax.set(xticks=[0, 1], xticklabels=list(scores), ylabel="accuracy", ylim=(0, 1.05))
ax.legend()
plt.show()
