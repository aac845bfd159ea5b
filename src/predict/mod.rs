//! Texts in, predictions out.
