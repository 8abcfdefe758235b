//! The record stream: what a checkpoint file holds and what a link carries. See `docs/image.md`.
