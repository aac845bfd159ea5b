//! What moves on a terminal while a command runs; quiet where there is no terminal.
