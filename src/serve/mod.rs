//! Every task over HTTP, from one copy of the base.
//!
//! Patches lie in a `store` (a folder, a bucket, an HTTP server), which is all the state there is. The `registry`
//! keeps those that are asked for attached to the encoder, and swaps in a new version only when it is checked and whole.
//! Requests of all tasks wait in one queue; the `batcher`, the encoder's only owner, fills each forward from it by a
//! budget of tokens. Invariant: a request runs wholly on the patch versions it was queued for, and its answer has the
//! bits that these give alone.
//!
//! Start reading at [`Server`]; `routes` is `/v1`, `inference_protocol` `/v2`.

mod answering;
mod app;
mod batcher;
mod exposition;
mod inference_protocol;
mod keys;
mod name;
mod options;
mod page;
mod problem;
mod registry;
mod request;
mod routes;
mod server;
mod store;
mod tei;

pub use name::TaskName;
pub use options::Options;
pub use server::Server;
pub use store::Store;
