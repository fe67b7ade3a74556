//! The HTTP edge over real sockets, with a fake gateway behind it.

mod answers;
mod errors;
mod fake;
mod serving;
