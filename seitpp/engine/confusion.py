"""Confusions as counts of the pairs of label and prediction that occur: small for any number of classes."""

from typing import NamedTuple

import numpy as np

SHOWN = 50  # classes of a picture: more names would be unreadable


class Confusions(NamedTuple):
    """The pairs of label and prediction that occur, in ascending order, and how many images each has.

    `labels`, `predictions` and `images` are (pairs,) int64; `num_classes` is the number of classes, most of which
    may not occur.
    """

    labels: np.ndarray
    predictions: np.ndarray
    images: np.ndarray
    num_classes: int

    @classmethod
    def count(cls, labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> "Confusions":
        """Count the pairs of (N,) int64 labels and predictions in 0 .. num_classes - 1."""
        pairs, images = np.unique(labels * num_classes + predictions, return_counts=True)
        return cls(*np.divmod(pairs, num_classes), images, num_classes)

    @property
    def images_of(self) -> np.ndarray:
        """The number of images of each class: (num_classes,) int64."""
        return self._sums(self.labels, np.ones(len(self.labels), bool))

    @property
    def correct_of(self) -> np.ndarray:
        """The number of correctly predicted images of each class: (num_classes,) int64."""
        return self._sums(self.labels, self.labels == self.predictions)

    @property
    def taken_for(self) -> np.ndarray:
        """The class for which most of the wrong images of each class are taken, -1 without: (num_classes,) int64.

        Of several with equally many images it is the first.
        """
        wrong = self.labels != self.predictions
        order = np.lexsort((-self.predictions[wrong], self.images[wrong]))
        taken = np.full(self.num_classes, -1)
        taken[self.labels[wrong][order]] = self.predictions[wrong][order]  # the last write counts: the most images
        return taken

    def most_confused(self, shown: int = SHOWN) -> np.ndarray:
        """Return the `shown` classes with most wrong images, by label or prediction, in ascending order.

        All classes are returned if there are no more.
        """
        wrong = self.labels != self.predictions
        errors = self._sums(self.labels, wrong) + self._sums(self.predictions, wrong)
        return np.sort(np.argsort(-errors, kind="stable")[:shown])

    def fractions(self, classes: np.ndarray) -> np.ndarray:
        """Return the matrix of some classes (n,), ascending: (n, n) float64, row = label, column = prediction.

        Each entry is the fraction of all images of its label; a row of a class without images is 0.
        """
        places = np.full(self.num_classes, -1)
        places[classes] = np.arange(len(classes))
        rows, columns = places[self.labels], places[self.predictions]
        inside = (rows >= 0) & (columns >= 0)
        matrix = np.zeros((len(classes), len(classes)))
        matrix[rows[inside], columns[inside]] = self.images[inside]
        return matrix / np.maximum(self.images_of[classes], 1)[:, None]

    def _sums(self, classes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        sums = np.zeros(self.num_classes, np.int64)
        np.add.at(sums, classes[chosen], self.images[chosen])
        return sums
