//! Training: what one run does from its first step to its patch.
