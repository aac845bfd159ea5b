//! skeleton
/// How far a download from the hub is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// The file, as it is named on the hub.
    pub file: String,
    /// Bytes that have arrived.
    pub bytes: u64,
    /// Bytes in all; 0 where the hub does not say.
    pub total: u64,
}
