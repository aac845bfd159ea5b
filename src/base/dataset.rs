//! Data sets on the hub: their files, by way of the hub tools' own cache.
//!
//! The same client, cache, variables (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, ..) and checks as for a base.

use std::path::PathBuf;
use std::sync::Arc;

use super::hub::{self, Download};
use crate::error::Result;

/// Brings files of a data set (`org/name`) into the cache where they are not there yet, all of one commit of its main
/// branch, and returns where they lie, in order. `watch` is called from another thread, often; it must not block.
///
/// # Errors
///
/// A data set or file that is not there, or not for this token; no hub in reach, or offline mode, and files that the
/// cache does not hold; a download that broke off or is not what was announced; a program without the feature `hub`.
pub fn fetch(id: &str, names: &[String], watch: impl Fn(&Download) + Send + Sync + 'static) -> Result<Vec<PathBuf>> {
    hub::fetch_dataset(id, names, Arc::new(watch))
}
