"""Distil U-Nets: train a teacher, distil a student, export it for `kdunet_infer`."""

from __future__ import annotations
