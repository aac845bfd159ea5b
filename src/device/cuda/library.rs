//! The driver, NVRTC and cuBLASLt: found where users have them, or named as missing.
//!
//! The driver is reached through `cudarc`, which opens it at the first call and panics where it cannot: so [`driver`]
//! comes before every other call. NVRTC and cuBLASLt are opened here, by full path, and their functions kept in a table
//! each. `cudarc` would ask the loader for `libnvrtc.so` first, whatever was opened before; where a toolkit is newer than
//! the driver, that is the one that does not fit.

use std::ffi::{OsStr, OsString, c_char, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cudarc::cublaslt::sys as lt;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys as cu;
use libloading::Library;

use crate::error::{Error, Result};

/// A version of CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 13 of 13.2.
    pub major: u32,
    /// 2 of 13.2.
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a driver must be for at least: older ones lack calls that are made without asking.
pub const OLDEST_DRIVER: Version = Version { major: 12, minor: 0 };

/// Versions of NVRTC and cuBLASLt whose calls are the ones written down here, the best first.
const MAJORS: [u32; 2] = [13, 12];

/// What to do where there is no way around it.
const OR_CPU: &str = "or use --device cpu";

/// A driver that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Driver {
    /// The CUDA that it is for.
    pub version: Version,
    /// How many devices it shows.
    pub devices: usize,
}

/// Starts the driver.
///
/// # Errors
///
/// Where there is none, where it is too old or does not start, and where it finds no device.
pub fn driver() -> Result<Driver> {
    check_driver_library()?;
    let (mut number, mut devices) = (0, 0);
    // SAFETY: the library is there, every version of it has this call, and the place outlives it.
    unsafe { cu::cuDriverGetVersion(&mut number) }.result().map_err(not_started)?;
    let version = Version { major: number.unsigned_abs() / 1000, minor: number.unsigned_abs() % 1000 / 10 };
    if version < OLDEST_DRIVER {
        return Err(too_old(version));
    }
    // SAFETY: as above; 0 is the only flag there is.
    unsafe { cu::cuInit(0) }.result().map_err(not_started)?;
    // SAFETY: the driver is started, and the place outlives the call.
    unsafe { cu::cuDeviceGetCount(&mut devices) }.result().map_err(not_started)?;
    match usize::try_from(devices) {
        Ok(devices) if devices > 0 => Ok(Driver { version, devices }),
        _ => Err(no_device()),
    }
}

/// The driver's library, as the loader knows it.
const DRIVER: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

/// What is called of it: a call that is missing would be a panic later.
const CALLS: [&str; 39] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamDestroy_v2",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
];

fn check_driver_library() -> Result<()> {
    // SAFETY: the library's own code for being opened is all that runs.
    let library = unsafe { Library::new(DRIVER) }.map_err(|e| no_driver(&reason(&e)))?;
    let missing = CALLS.iter().find(|call| {
        // SAFETY: the symbol is looked up and never called.
        unsafe { library.get::<*const c_void>(call.as_bytes()) }.is_err()
    });
    match missing {
        None => Ok(()),
        Some(call) => Err(Error::Device(format!(
            "the {DRIVER} that the loader finds has no {call}: it is no NVIDIA driver, or one from before CUDA \
             {OLDEST_DRIVER}; install one, {OR_CPU}"
        ))),
    }
}

/// What the loader says of a library that it does not open.
fn reason(error: &libloading::Error) -> String {
    use std::error::Error as _;
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

fn no_driver(reason: &str) -> Error {
    Error::Device(format!("no NVIDIA driver ({reason}): install it, {OR_CPU}"))
}

fn no_device() -> Error {
    Error::Device(format!(
        "the NVIDIA driver starts but finds no device: see what `nvidia-smi` lists and what CUDA_VISIBLE_DEVICES \
         hides, {OR_CPU}"
    ))
}

fn too_old(found: Version) -> Error {
    Error::Device(format!(
        "the NVIDIA driver is for CUDA {found}, CUDA {OLDEST_DRIVER} or later is needed: update the driver, {OR_CPU}"
    ))
}

fn not_started(error: DriverError) -> Error {
    match error.0 {
        cu::CUresult::CUDA_ERROR_NO_DEVICE => no_device(),
        cu::CUresult::CUDA_ERROR_STUB_LIBRARY => Error::Device(format!(
            "the libcuda that the loader finds is a toolkit's stub and no driver: take its folder out of \
             LD_LIBRARY_PATH, {OR_CPU}"
        )),
        _ => Error::Device(format!("the NVIDIA driver does not start: {}; {OR_CPU}", told(error))),
    }
}

/// A driver's error: its name and what it says.
pub fn told(error: DriverError) -> String {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{name}: {text}"),
        _ => format!("CUDA error {}", error.0 as u32),
    }
}

/// A table of a library's functions, by the names that C knows them by.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($name:ident($($argument:ty),*) $(-> $result:ty)?;)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case, missing_docs)]
        pub struct $table {
            $(pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $table {
            /// Finds every function, which the library must then outlive.
            fn of(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of NVIDIA's headers, the same in CUDA 12 and 13.
                unsafe { Ok(Self { $($name: *library.get(concat!(stringify!($name), "\0"))?,)* }) }
            }
        }
    };
}

/// A program of NVRTC's.
pub type Program = *mut c_void;

// Results are numbers here: a later version may return one that `cudarc`'s enums do not know, which would be undefined.
functions! {
    /// NVRTC's functions.
    NvrtcFunctions {
        nvrtcVersion(*mut c_int, *mut c_int) -> c_int;
        nvrtcGetErrorString(c_int) -> *const c_char;
        nvrtcGetNumSupportedArchs(*mut c_int) -> c_int;
        nvrtcGetSupportedArchs(*mut c_int) -> c_int;
        nvrtcCreateProgram(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int;
        nvrtcCompileProgram(Program, c_int, *const *const c_char) -> c_int;
        nvrtcDestroyProgram(*mut Program) -> c_int;
        nvrtcGetProgramLogSize(Program, *mut usize) -> c_int;
        nvrtcGetProgramLog(Program, *mut c_char) -> c_int;
        nvrtcGetCUBINSize(Program, *mut usize) -> c_int;
        nvrtcGetCUBIN(Program, *mut c_char) -> c_int;
        nvrtcGetPTXSize(Program, *mut usize) -> c_int;
        nvrtcGetPTX(Program, *mut c_char) -> c_int;
    }
}

functions! {
    /// cuBLASLt's functions.
    CublasLtFunctions {
        cublasLtGetVersion() -> usize;
        cublasLtGetStatusString(c_int) -> *const c_char;
        cublasLtCreate(*mut lt::cublasLtHandle_t) -> c_int;
        cublasLtDestroy(lt::cublasLtHandle_t) -> c_int;
        cublasLtMatmulDescCreate(*mut lt::cublasLtMatmulDesc_t, lt::cublasComputeType_t, lt::cudaDataType) -> c_int;
        cublasLtMatmulDescDestroy(lt::cublasLtMatmulDesc_t) -> c_int;
        cublasLtMatmulDescSetAttribute(lt::cublasLtMatmulDesc_t, lt::cublasLtMatmulDescAttributes_t, *const c_void, usize) -> c_int;
        cublasLtMatrixLayoutCreate(*mut lt::cublasLtMatrixLayout_t, lt::cudaDataType, u64, u64, i64) -> c_int;
        cublasLtMatrixLayoutDestroy(lt::cublasLtMatrixLayout_t) -> c_int;
        cublasLtMatmulPreferenceCreate(*mut lt::cublasLtMatmulPreference_t) -> c_int;
        cublasLtMatmulPreferenceDestroy(lt::cublasLtMatmulPreference_t) -> c_int;
        cublasLtMatmulPreferenceSetAttribute(lt::cublasLtMatmulPreference_t, lt::cublasLtMatmulPreferenceAttributes_t, *const c_void, usize) -> c_int;
        cublasLtMatmulAlgoGetHeuristic(
            lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t,
            lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t,
            lt::cublasLtMatmulPreference_t, c_int, *mut Candidate, *mut c_int
        ) -> c_int;
        cublasLtMatmulAlgoCheck(
            lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t,
            lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t,
            *const lt::cublasLtMatmulAlgo_t, *mut Candidate
        ) -> c_int;
        cublasLtMatmulAlgoConfigGetAttribute(
            *const lt::cublasLtMatmulAlgo_t, lt::cublasLtMatmulAlgoConfigAttributes_t, *mut c_void, usize, *mut usize
        ) -> c_int;
        cublasLtMatmul(
            lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, *const c_void,
            *const c_void, lt::cublasLtMatrixLayout_t, *const c_void, lt::cublasLtMatrixLayout_t, *const c_void,
            *const c_void, lt::cublasLtMatrixLayout_t, *mut c_void, lt::cublasLtMatrixLayout_t,
            *const lt::cublasLtMatmulAlgo_t, *mut c_void, usize, lt::cudaStream_t
        ) -> c_int;
    }
}

/// `cublasLtMatmulHeuristicResult_t`, its state a number.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// The algorithm.
    pub algorithm: lt::cublasLtMatmulAlgo_t,
    /// Bytes of workspace that it needs.
    pub workspace_bytes: usize,
    /// 0 where the rest is valid.
    pub state: c_int,
    /// How many times it fills the card.
    pub waves: f32,
    reserved: [c_int; 4],
}

impl Candidate {
    /// Room for one.
    pub const EMPTY: Candidate = Candidate {
        algorithm: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspace_bytes: 0,
        state: 0,
        waves: 0.0,
        reserved: [0; 4],
    };
}

/// The compiler of kernels, opened.
pub struct Nvrtc {
    /// Its functions.
    pub functions: NvrtcFunctions,
    /// Its version.
    pub version: Version,
    /// Where it was found; a bare name where the loader knew it.
    pub path: PathBuf,
    /// The architectures that it knows: 90 is 9.0.
    pub architectures: Vec<u32>,
}

/// The library of products, opened.
pub struct CublasLt {
    /// Its functions.
    pub functions: CublasLtFunctions,
    /// Its own number: 130400 is 13.4.0.
    pub version: usize,
    /// Where it was found; a bare name where the loader knew it.
    pub path: PathBuf,
}

/// A library to look for.
#[derive(Clone, Copy)]
struct Wanted {
    title: &'static str,
    /// Its file's name before the major version.
    file: &'static str,
}

const NVRTC: Wanted = Wanted { title: "NVRTC", file: "libnvrtc.so" };
const CUBLASLT: Wanted = Wanted { title: "cuBLASLt", file: "libcublasLt.so" };

/// NVRTC, of a major version that the driver knows; of any where no driver is named, to compile without one.
///
/// # Errors
///
/// Where there is none.
pub fn nvrtc(driver: Option<Version>) -> Result<&'static Nvrtc> {
    static OPENED: Mutex<Vec<&Nvrtc>> = Mutex::new(Vec::new());
    let mut opened = OPENED.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(known) = opened.iter().find(|known| fits(known.version.major, driver)) {
        return Ok(known);
    }
    let nvrtc = &*Box::leak(Box::new(first(NVRTC, driver, &folders(), open_nvrtc)?));
    opened.push(nvrtc);
    Ok(nvrtc)
}

/// cuBLASLt, of a major version that the driver knows.
///
/// # Errors
///
/// Where there is none.
pub fn cublaslt(driver: Option<Version>) -> Result<&'static CublasLt> {
    static OPENED: Mutex<Vec<(u32, &CublasLt)>> = Mutex::new(Vec::new());
    let mut opened = OPENED.lock().unwrap_or_else(|e| e.into_inner());
    if let Some((_, known)) = opened.iter().find(|(major, _)| fits(*major, driver)) {
        return Ok(known);
    }
    let library = &*Box::leak(Box::new(first(CUBLASLT, driver, &folders(), open_cublaslt)?));
    opened.push(((library.version / 10_000) as u32, library));
    Ok(library)
}

/// A driver runs what is made for its own major version of CUDA and for those before it.
fn fits(major: u32, driver: Option<Version>) -> bool {
    driver.is_none_or(|driver| major <= driver.major)
}

/// Opens a library for good: its functions are kept, and what it started may not be unloaded.
fn open(path: &Path) -> Result<&'static Library, String> {
    // SAFETY: a library of NVIDIA's, named as such: opening it prepares it and does nothing else.
    let library = unsafe { Library::new(path) }.map_err(|e| reason(&e))?;
    Ok(Box::leak(Box::new(library)))
}

fn open_nvrtc(path: &Path) -> Result<Nvrtc, String> {
    // NVRTC opens its builtins by their bare name, and not every version says that they lie beside it; a library that
    // is open already is found by that name.
    for beside in path.parent().and_then(|folder| folder.read_dir().ok()).into_iter().flatten().flatten() {
        if beside.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so.") {
            open(&beside.path())?;
        }
    }
    let functions = NvrtcFunctions::of(open(path)?).map_err(|e| reason(&e))?;
    let (mut major, mut minor, mut n) = (0, 0, 0);
    // SAFETY: the places outlive the calls.
    let failed =
        unsafe { (functions.nvrtcVersion)(&mut major, &mut minor) | (functions.nvrtcGetNumSupportedArchs)(&mut n) };
    let mut known = vec![0; usize::try_from(n).unwrap_or(0)];
    // SAFETY: there is room for as many as it said.
    if failed != 0 || unsafe { (functions.nvrtcGetSupportedArchs)(known.as_mut_ptr()) } != 0 {
        return Err("it does not say what it is".into());
    }
    let version = Version { major: major.unsigned_abs(), minor: minor.unsigned_abs() };
    let architectures = known.into_iter().map(c_int::unsigned_abs).collect();
    Ok(Nvrtc { functions, version, path: path.into(), architectures })
}

fn open_cublaslt(path: &Path) -> Result<CublasLt, String> {
    // It needs no library but the system's: `libcublas`, which stands on it, stays closed.
    let functions = CublasLtFunctions::of(open(path)?).map_err(|e| reason(&e))?;
    // SAFETY: it takes nothing.
    let version = unsafe { (functions.cublasLtGetVersion)() };
    Ok(CublasLt { functions, version, path: path.into() })
}

/// The first library of `folders`, and then of the loader's own path, that fits the driver and opens.
fn first<T>(
    wanted: Wanted,
    driver: Option<Version>,
    folders: &[PathBuf],
    open: impl Fn(&Path) -> Result<T, String>,
) -> Result<T> {
    let mut refused = Vec::new();
    for folder in folders {
        for major in MAJORS {
            let path = folder.join(format!("{}.{major}", wanted.file));
            if !path.exists() {
                continue;
            }
            match driver {
                Some(driver) if !fits(major, Some(driver)) => {
                    refused
                        .push(format!("{} needs a driver for CUDA {major}, this one is for {driver}", path.display()));
                }
                _ => match open(&path) {
                    Ok(library) => return Ok(library),
                    Err(reason) => refused.push(format!("{} does not open: {reason}", path.display())),
                },
            }
        }
    }
    let by_name = MAJORS.into_iter().filter(|major| fits(*major, driver));
    let by_name = by_name.filter_map(|major| open(Path::new(&format!("{}.{major}", wanted.file))).ok()).next();
    by_name.ok_or_else(|| missing(wanted, driver, folders, &refused))
}

fn missing(wanted: Wanted, driver: Option<Version>, folders: &[PathBuf], refused: &[String]) -> Error {
    let majors = MAJORS.into_iter().filter(|major| fits(*major, driver));
    let files = majors.map(|major| format!("{}.{major}", wanted.file)).collect::<Vec<_>>().join(" or ");
    let looked = |folder: &PathBuf| match folder.is_dir() {
        true => folder.display().to_string(),
        false => format!("{} (no folder)", folder.display()),
    };
    let looked: Vec<String> = folders.iter().map(looked).collect();
    let looked = if looked.is_empty() { String::new() } else { format!(" in {}, nor", looked.join(", ")) };
    let suffix = if driver.is_some_and(|driver| driver.major < 13) { "-cu12" } else { "" };
    let refused: String = refused.iter().map(|reason| format!("; {reason}")).collect();
    let packages = match suffix {
        "" => "nvidia-cuda-nvrtc nvidia-cublas".to_string(),
        suffix => format!("nvidia-cuda-nvrtc{suffix} nvidia-cublas{suffix}"),
    };
    Error::Device(format!(
        "{} is missing: no {files}{looked} where the loader looks{refused}. Install it with `python3 -m pip \
         install {packages}`, or name the folder that holds it in BITFIT_CUDA_LIBS, {OR_CPU}",
        wanted.title
    ))
}

/// Where this user's libraries may lie.
fn folders() -> Vec<PathBuf> {
    folders_of(|name| std::env::var_os(name), Path::new("/"))
}

/// Folders to look in, the first first: those that the user named, all of them, so that a message shows a misspelt one;
/// then those that are there of the active virtual environment, the toolkit that is named, Python packages outside an
/// environment, and the toolkits under `/usr/local`.
fn folders_of(variable: impl Fn(&str) -> Option<OsString>, root: &Path) -> Vec<PathBuf> {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let folder = |name: &str| variable(name).map(PathBuf::from);
    let named = variable("BITFIT_CUDA_LIBS");
    let named = named.iter().flat_map(std::env::split_paths).filter(|folder| !folder.as_os_str().is_empty());

    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(folder);
    let conda = folder("CONDA_PREFIX").map(|prefix| prefix.join("lib"));
    let toolkit = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(folder).map(|toolkit| toolkit.join("lib64"));
    // Where the line that a message offers puts packages when no environment is active.
    let prefixes = folder("HOME").map(|home| home.join(".local")).into_iter();
    let prefixes = prefixes.chain([root.join("usr/local"), root.join("usr")]);
    let toolkits = within(&root.join("usr/local"), "cuda").into_iter().map(|toolkit| toolkit.join("lib64"));

    let found = environments.flat_map(|prefix| packages(&prefix)).chain(conda);
    let found = found.chain(toolkit).chain(prefixes.flat_map(|prefix| packages(&prefix))).chain(toolkits);
    named.chain(found.filter(|folder| folder.is_dir())).collect()
}

/// The folders of NVIDIA's wheels under a Python's prefix. Those for CUDA 13 share one, those for 12 have one each.
fn packages(prefix: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for python in within(&prefix.join("lib"), "python3") {
        for packages in ["site-packages", "dist-packages"] {
            for wheel in ["cu13", "cuda_nvrtc", "cublas", "cu12"] {
                folders.push(python.join(packages).join("nvidia").join(wheel).join("lib"));
            }
        }
    }
    folders
}

/// What a folder holds under names that begin so: the bare name first, then the latest version.
fn within(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let names = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut names: Vec<OsString> = names.filter(|name| name.to_string_lossy().starts_with(prefix)).collect();
    let version = |name: &OsStr| -> Vec<u32> {
        let name = name.to_string_lossy();
        name[prefix.len()..].split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names.sort_by_cached_key(|name| (name != prefix, std::cmp::Reverse(version(name)), name.clone()));
    names.into_iter().map(|name| folder.join(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRIVER_12: Option<Version> = Some(Version { major: 12, minor: 4 });
    const DRIVER_13: Option<Version> = Some(Version { major: 13, minor: 0 });

    /// A folder with empty files of these names.
    fn with_files(names: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for name in names {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"").unwrap();
        }
        root
    }

    #[test]
    fn folders_that_are_named_come_first_then_the_environment_the_toolkit_and_what_the_system_has() {
        let root = with_files(&[
            "venv/lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib/x",
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib/x",
            "venv/lib/python3.12/site-packages/nvidia/cublas/lib/x",
            "toolkit/lib64/x",
            "home/.local/lib/python3.11/site-packages/nvidia/cu13/lib/x",
            "usr/local/cuda-9.2/lib64/x",
            "usr/local/cuda-12.4/lib64/x",
            "usr/local/cuda-13.0/lib64/x",
            "usr/local/cuda/lib64/x",
            "usr/lib/python3/dist-packages/nvidia/cu13/lib/x",
        ]);
        let at = |name: &str| root.path().join(name);
        let variable = |name: &str| match name {
            "BITFIT_CUDA_LIBS" => Some(std::env::join_paths([at("mine"), at("not there")]).unwrap()),
            "VIRTUAL_ENV" => Some(at("venv").into()),
            "CUDA_HOME" => Some(at("toolkit").into()),
            "HOME" => Some(at("home").into()),
            "CUDA_PATH" => Some("".into()),
            _ => None,
        };
        let expected = [
            "mine",
            "not there",
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib",
            "venv/lib/python3.12/site-packages/nvidia/cublas/lib",
            "venv/lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib",
            "toolkit/lib64",
            "home/.local/lib/python3.11/site-packages/nvidia/cu13/lib",
            "usr/lib/python3/dist-packages/nvidia/cu13/lib",
            "usr/local/cuda/lib64",
            "usr/local/cuda-13.0/lib64",
            "usr/local/cuda-12.4/lib64",
            "usr/local/cuda-9.2/lib64",
        ];
        assert_eq!(folders_of(variable, root.path()), expected.map(at));
    }

    #[test]
    fn the_first_library_that_fits_the_driver_is_opened() {
        let root = with_files(&["a/libnvrtc.so.13", "b/libnvrtc.so.12", "b/libnvrtc.so.13", "b/libnvrtc.alt.so.13"]);
        let folders = ["none", "a", "b"].map(|name| root.path().join(name));
        let opened = |driver, broken: &str| {
            let open = |path: &Path| match path.is_absolute() && !path.ends_with(broken) {
                true => Ok(path.strip_prefix(root.path()).unwrap().to_str().unwrap().to_string()),
                false => Err("broken".to_string()),
            };
            first(NVRTC, driver, &folders, open)
        };
        assert_eq!(opened(None, "-").unwrap(), "a/libnvrtc.so.13");
        assert_eq!(opened(DRIVER_13, "-").unwrap(), "a/libnvrtc.so.13");
        assert_eq!(opened(DRIVER_12, "-").unwrap(), "b/libnvrtc.so.12");
        assert_eq!(opened(DRIVER_13, "a/libnvrtc.so.13").unwrap(), "b/libnvrtc.so.13");
        let message = opened(DRIVER_12, "b/libnvrtc.so.12").unwrap_err().to_string();
        let a = root.path().join("a/libnvrtc.so.13");
        assert!(
            message.contains(&format!("{} needs a driver for CUDA 13, this one is for 12.4", a.display())),
            "{message}"
        );
        assert!(message.contains("b/libnvrtc.so.12 does not open: broken"), "{message}");
    }

    #[test]
    fn the_loader_is_asked_last_and_by_a_name_that_fits() {
        let by_name = |driver| first(CUBLASLT, driver, &[], |path| Ok(path.to_path_buf())).unwrap();
        assert_eq!(by_name(DRIVER_13), Path::new("libcublasLt.so.13"));
        assert_eq!(by_name(DRIVER_12), Path::new("libcublasLt.so.12"));
    }

    #[test]
    fn what_is_missing_is_named_with_where_it_was_looked_for_and_what_brings_it() {
        let nothing = |_: &Path| Err::<(), _>("no".into());
        let message = |wanted, driver| first(wanted, driver, &["/x".into()], nothing).unwrap_err().to_string();
        assert_eq!(
            message(NVRTC, DRIVER_13),
            "device: NVRTC is missing: no libnvrtc.so.13 or libnvrtc.so.12 in /x (no folder), nor where the loader looks. Install \
             it with `python3 -m pip install nvidia-cuda-nvrtc nvidia-cublas`, or name the folder that holds it in \
             BITFIT_CUDA_LIBS, or use --device cpu"
        );
        let twelve = message(CUBLASLT, DRIVER_12);
        assert!(twelve.contains("cuBLASLt is missing: no libcublasLt.so.12 in /x (no folder), nor"), "{twelve}");
        assert!(twelve.contains("pip install nvidia-cuda-nvrtc-cu12 nvidia-cublas-cu12`"), "{twelve}");
    }

    #[test]
    fn a_library_that_is_none_is_refused_and_not_fatal() {
        let root = with_files(&["libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libcublasLt.so.13"]);
        assert!(open_nvrtc(&root.path().join("libnvrtc.so.13")).is_err());
        assert!(open_cublaslt(&root.path().join("libcublasLt.so.13")).is_err());
    }

    #[test]
    fn a_driver_is_started_or_its_lack_is_told() {
        match driver() {
            Ok(driver) => assert!(driver.version >= OLDEST_DRIVER && driver.devices > 0),
            Err(e) => assert!(e.to_string().contains("use --device cpu"), "{e}"),
        }
        let messages = [no_driver("libcuda.so.1: not found"), no_device(), too_old(Version { major: 11, minor: 8 })]
            .map(|e| e.to_string());
        assert!(messages[0].starts_with("device: no NVIDIA driver"), "{}", messages[0]);
        assert!(messages[1].contains("finds no device"), "{}", messages[1]);
        assert!(messages[2].contains("is for CUDA 11.8, CUDA 12.0 or later is needed"), "{}", messages[2]);
    }
}
