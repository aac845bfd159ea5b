//! The kernels' source, made into machine code for the card at hand by NVRTC, and kept on disk.
//!
//! A program carries its kernels as text, so that one binary serves every card: those that are newer than it, too.
//! Compiling takes seconds; the cache makes that once a card and version. What it holds is checked when it is read, and
//! a cache that cannot be read or written costs time alone.

use std::ffi::{CStr, CString, OsString, c_char, c_int};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::ptr;

use sha2::{Digest, Sha256};

use super::card::Precision;
use super::library::{Nvrtc, Program};
use crate::error::{Error, Result};

/// A file of source: the name by which others include it, and its text.
pub type Source<'a> = (&'a str, &'a str);

/// A table of the files of `kernels/`.
macro_rules! kernels {
    ($($file:literal),* $(,)?) => { &[$(($file, include_str!(concat!("kernels/", $file)))),*] };
}

/// The kernels: the first file is compiled, it includes the others.
pub const SOURCES: &[Source] = kernels![
    "all.cu",
    "device.cuh",
    "batch.cuh",
    "attention.cu",
    "heads.cu",
    "linear.cu",
    "norm.cu",
    "optimizer.cu",
    "rows.cu",
    "weights.cu",
];

/// What NVRTC made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code; for a `compute_` architecture PTX, with the zero that ends it.
    pub image: Vec<u8>,
    /// What it had to say.
    pub log: String,
}

/// What to compile, and for what.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// The file to compile, and those that it includes.
    pub sources: &'a [Source<'a>],
    /// What the kernels compute in.
    pub precision: Precision,
    /// `sm_90a`: machine code for one kind of card; `compute_120`: PTX, which a driver makes into machine code.
    pub architecture: &'a str,
}

impl Job<'_> {
    fn options(&self) -> [String; 4] {
        let precision = match self.precision {
            Precision::F32 => 0,
            Precision::Tf32 => 1,
            Precision::Bf16 => 2,
        };
        // Lines are for compute-sanitizer and profilers; they change no instruction.
        [
            format!("--gpu-architecture={}", self.architecture),
            "--std=c++17".into(),
            format!("-DPRECISION={precision}"),
            "-lineinfo".into(),
        ]
    }

    /// Compiles, and has registers, stack and spills of each kernel told in the log.
    ///
    /// # Errors
    ///
    /// Where the source is wrong, with NVRTC's words.
    pub fn compile(&self, nvrtc: &Nvrtc) -> Result<Compiled> {
        let failed = |what: &str| {
            Error::Device(format!(
                "the kernels do not compile for {} (NVRTC {}, {}): {what}",
                self.architecture,
                nvrtc.version,
                nvrtc.path.display()
            ))
        };
        let text = |text: &str| CString::new(text).map_err(|_| failed("a zero byte in the source"));
        let [(name, source), headers @ ..] = self.sources else {
            return Err(failed("no source"));
        };
        let (name, source) = (text(name)?, text(source)?);
        let names = headers.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>>>()?;
        let texts = headers.iter().map(|(_, header)| text(header)).collect::<Result<Vec<_>>>()?;
        let mut options = self.options().iter().map(|option| text(option)).collect::<Result<Vec<_>>>()?;
        options.push(c"--ptxas-options=-v".into());
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<*const c_char>>();
        let (names_at, texts_at, options_at) = (pointers(&names), pointers(&texts), pointers(&options));

        let calls = &nvrtc.functions;
        let mut program = Open { program: ptr::null_mut(), nvrtc };
        // SAFETY: every text ends in a zero and outlives the program, of names and headers there are as many as said.
        let created = unsafe {
            (calls.nvrtcCreateProgram)(
                &mut program.program,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                texts_at.as_ptr(),
                names_at.as_ptr(),
            )
        };
        ok(nvrtc, created).map_err(|e| failed(&e))?;
        // SAFETY: the program is there, and so are the options.
        let result =
            unsafe { (calls.nvrtcCompileProgram)(program.program, options_at.len() as c_int, options_at.as_ptr()) };
        let log = program.bytes(calls.nvrtcGetProgramLogSize, calls.nvrtcGetProgramLog).unwrap_or_default();
        let log = String::from_utf8_lossy(log.strip_suffix(b"\0").unwrap_or(&log)).trim().to_string();
        ok(nvrtc, result).map_err(|e| failed(&format!("{e}\n{log}")))?;
        let image = match self.architecture.starts_with("compute_") {
            true => program.bytes(calls.nvrtcGetPTXSize, calls.nvrtcGetPTX),
            false => program.bytes(calls.nvrtcGetCUBINSize, calls.nvrtcGetCUBIN),
        };
        let image = image.map_err(|e| failed(&e))?;
        if image.is_empty() { Err(failed("nothing came out")) } else { Ok(Compiled { image, log }) }
    }

    /// What decides the machine code, and so its name in the cache.
    fn key(&self, nvrtc: &Nvrtc) -> [u8; 32] {
        let mut hash = Sha256::new();
        // Each with its length, so that no two lists look the same.
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        field(b"bitfit kernels 1");
        field(nvrtc.version.to_string().as_bytes());
        self.options().iter().for_each(|option| field(option.as_bytes()));
        self.sources.iter().for_each(|(name, text)| {
            field(name.as_bytes());
            field(text.as_bytes());
        });
        hash.finalize().into()
    }
}

/// The kernels for a card, from the user's cache where it has them.
///
/// # Errors
///
/// Where they do not compile.
pub fn kernels(nvrtc: &Nvrtc, capability: (u32, u32), precision: Precision) -> Result<Vec<u8>> {
    let architecture = architecture(capability, &nvrtc.architectures);
    let job = Job { sources: SOURCES, precision, architecture: &architecture };
    Cache::of_user(|name| std::env::var_os(name)).get_or(job.key(nvrtc), || Ok(job.compile(nvrtc)?.image))
}

/// What to compile for, for a card of this compute capability: machine code where NVRTC knows the card or an older one
/// of its kind, whose code it runs; else PTX of the latest architecture that came before it.
///
/// Cards of 9 and 10 have instructions (`wgmma`, `tcgen05`) that only code made for exactly them may use: the letter.
pub fn architecture((major, minor): (u32, u32), known: &[u32]) -> String {
    let card = 10 * major + minor;
    let letter = if matches!(major, 9 | 10) { "a" } else { "" };
    let before = |k: &u32| *k <= card;
    let kin = known.iter().copied().filter(before).filter(|k| k / 10 == major).max();
    match (kin, known.iter().copied().filter(before).max()) {
        (Some(kin), _) if kin == card => format!("sm_{kin}{letter}"),
        (Some(kin), _) => format!("sm_{kin}"),
        (None, Some(latest)) => format!("compute_{latest}"),
        // NVRTC knows only later cards; it says so itself.
        (None, None) => format!("sm_{card}{letter}"),
    }
}

/// A program that is given back.
struct Open<'a> {
    program: Program,
    nvrtc: &'a Nvrtc,
}

impl Open<'_> {
    /// What a pair of functions, one for the size and one for the bytes, has to give.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut n = 0;
        // SAFETY: the program is there, and the place outlives the call.
        ok(self.nvrtc, unsafe { size(self.program, &mut n) })?;
        let mut bytes = vec![0; n];
        // SAFETY: there is room for as many bytes as it said.
        ok(self.nvrtc, unsafe { get(self.program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: it was created and is used no more.
            unsafe { (self.nvrtc.functions.nvrtcDestroyProgram)(&mut self.program) };
        }
    }
}

fn ok(nvrtc: &Nvrtc, result: c_int) -> Result<(), String> {
    if result == 0 {
        return Ok(());
    }
    // SAFETY: it takes any number and gives text that stays.
    let text = unsafe { CStr::from_ptr((nvrtc.functions.nvrtcGetErrorString)(result)) };
    Err(text.to_string_lossy().into_owned())
}

/// Machine code on disk, by the hash of what decides it. A file is the hash of its key and content, then the content.
#[derive(Debug, Clone)]
pub struct Cache {
    /// `None` where there is no place for one.
    folder: Option<PathBuf>,
}

impl Cache {
    /// The user's: under `$XDG_CACHE_HOME`, which must be absolute to count, or `~/.cache`.
    pub fn of_user(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let at = |name: &str| variable(name).map(PathBuf::from).filter(|folder| folder.is_absolute());
        let cache = at("XDG_CACHE_HOME").or_else(|| Some(at("HOME")?.join(".cache")));
        Self { folder: cache.map(|cache| cache.join("bitfit/kernels")) }
    }

    /// What is kept under `key`; where nothing whole is, what `make` makes, which is kept if it can be.
    ///
    /// # Errors
    ///
    /// Those of `make`.
    pub fn get_or(&self, key: [u8; 32], make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        let Some(folder) = &self.folder else {
            return make();
        };
        let path = folder.join(format!("{}.bin", hex(&key)));
        if let Some(image) = fs::read(&path).ok().and_then(|bytes| checked(key, bytes)) {
            return Ok(image);
        }
        let image = make()?;
        // A disk that is full or not ours to write to: the next start compiles again.
        keep(folder, &path, key, &image).ok();
        Ok(image)
    }
}

fn hash_of(key: [u8; 32], image: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(key).chain_update(image).finalize().into()
}

fn checked(key: [u8; 32], mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let (hash, image) = bytes.split_at_checked(32)?;
    let whole = !image.is_empty() && hash == hash_of(key, image);
    whole.then(|| bytes.split_off(32))
}

/// Written aside, synced and renamed, so that two programs that start together never read half a file.
fn keep(folder: &Path, path: &Path, key: [u8; 32], image: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().prefix(".kernels.").suffix(".tmp").tempfile_in(folder)?;
    file.write_all(&hash_of(key, image))?;
    file.write_all(image)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    File::open(folder).and_then(|folder| folder.sync_all()).ok();
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::library;

    const KEY: [u8; 32] = [7; 32];

    fn never() -> Result<Vec<u8>> {
        panic!("it is in the cache")
    }

    fn cache_in(folder: &Path) -> Cache {
        Cache { folder: Some(folder.join("bitfit/kernels")) }
    }

    #[test]
    fn machine_code_is_made_once_a_key() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache_in(folder.path());
        assert_eq!(cache.get_or(KEY, || Ok(b"code".to_vec())).unwrap(), b"code");
        assert_eq!(cache.get_or(KEY, never).unwrap(), b"code");
        assert_eq!(cache.get_or([8; 32], || Ok(b"other".to_vec())).unwrap(), b"other");
        assert_eq!(fs::read_dir(folder.path().join("bitfit/kernels")).unwrap().count(), 2);
    }

    #[test]
    fn what_is_damaged_is_made_anew_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache_in(folder.path());
        cache.get_or(KEY, || Ok(b"code".to_vec())).unwrap();
        cache.get_or([8; 32], || Ok(b"other".to_vec())).unwrap();
        let [path, other] = [KEY, [8; 32]].map(|key| folder.path().join(format!("bitfit/kernels/{}.bin", hex(&key))));
        let whole = fs::read(&path).unwrap();
        let mut turned = whole.clone();
        *turned.last_mut().unwrap() ^= 1;
        for damaged in
            [turned, whole[..whole.len() - 1].to_vec(), whole[..32].to_vec(), vec![], fs::read(other).unwrap()]
        {
            fs::write(&path, damaged).unwrap();
            assert_eq!(cache.get_or(KEY, || Ok(b"code".to_vec())).unwrap(), b"code");
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("bitfit"), b"a file where a folder would be").unwrap();
        for cache in [cache_in(folder.path()), Cache { folder: None }] {
            assert_eq!(cache.get_or(KEY, || Ok(b"code".to_vec())).unwrap(), b"code");
            assert!(cache.get_or(KEY, || Err(Error::Device("no".into()))).is_err());
        }
    }

    #[test]
    fn the_cache_lies_where_the_user_keeps_caches() {
        let folder = |xdg: &str, home: &str| {
            let variable = |name: &str| match name {
                "XDG_CACHE_HOME" => Some(xdg.into()),
                "HOME" => Some(home.into()),
                _ => None,
            };
            Cache::of_user(variable).folder
        };
        assert_eq!(folder("/cache", "/home/me"), Some("/cache/bitfit/kernels".into()));
        for not_absolute in ["", "cache"] {
            assert_eq!(folder(not_absolute, "/home/me"), Some("/home/me/.cache/bitfit/kernels".into()));
        }
        assert_eq!(folder("", ""), None);
    }

    #[test]
    fn a_card_gets_its_own_machine_code_or_that_of_its_kin_or_ptx() {
        let (twelve_0, thirteen) =
            ([50, 70, 75, 80, 86, 87, 89, 90], [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]);
        let names = |capability| [architecture(capability, &twelve_0), architecture(capability, &thirteen)];
        assert_eq!(names((8, 0)), ["sm_80", "sm_80"]);
        assert_eq!(names((8, 9)), ["sm_89", "sm_89"]);
        assert_eq!(architecture((8, 9), &[70, 80]), "sm_80");
        assert_eq!(names((9, 0)), ["sm_90a", "sm_90a"]);
        assert_eq!(names((10, 0)), ["compute_90", "sm_100a"]);
        // Without the letter: `sm_100a` runs on 10.0 alone.
        assert_eq!(architecture((10, 3), &[90, 100, 120]), "sm_100");
        assert_eq!(names((12, 0)), ["compute_90", "sm_120"]);
        assert_eq!(names((13, 0)), ["compute_90", "compute_121"]);
        assert_eq!(architecture((11, 0), &[90, 100, 120]), "compute_100");
    }

    /// NVRTC, where the environment names its folder.
    fn nvrtc() -> Option<&'static Nvrtc> {
        if std::env::var_os("BITFIT_CUDA_LIBS").is_none() {
            eprintln!("skipped: BITFIT_CUDA_LIBS names no NVRTC (scripts/fetch_nvrtc.sh brings one)");
            return None;
        }
        Some(library::nvrtc(None).unwrap())
    }

    const MAIN: Source = (
        "main.cu",
        "#include \"scale.cuh\"\nextern \"C\" __global__ void scale(float* x) { x[threadIdx.x] *= SCALE; }",
    );
    const HEADER: Source = ("scale.cuh", "#if PRECISION == 2\n#define SCALE 2.0f\n#else\n#define SCALE 3.0f\n#endif");

    fn job<'a>(architecture: &'a str, precision: Precision, sources: &'a [Source<'a>]) -> Job<'a> {
        Job { sources, precision, architecture }
    }

    #[test]
    fn a_source_becomes_machine_code_or_ptx_without_a_driver_and_says_what_it_takes() {
        let Some(nvrtc) = nvrtc() else { return };
        let sources = [MAIN, HEADER];
        let made = |architecture, precision| job(architecture, precision, &sources).compile(nvrtc).unwrap();
        let code = made("sm_80", Precision::Bf16);
        assert!(code.image.starts_with(b"\x7fELF"));
        assert!(code.log.contains("0 bytes spill stores") && code.log.contains("registers"), "{}", code.log);
        assert_eq!(code.image, made("sm_80", Precision::Bf16).image);
        assert_ne!(code.image, made("sm_80", Precision::F32).image);
        let ptx = made("compute_80", Precision::F32).image;
        assert!(String::from_utf8_lossy(&ptx).contains(".target sm_80") && ptx.ends_with(b"\0"));
    }

    #[test]
    fn an_error_in_a_source_is_told_with_its_line_and_an_architecture_that_is_none_by_name() {
        let Some(nvrtc) = nvrtc() else { return };
        let broken = [MAIN, ("scale.cuh", "\n#error not today")];
        let message = job("sm_80", Precision::F32, &broken).compile(nvrtc).unwrap_err().to_string();
        assert!(message.contains("scale.cuh(2)") && message.contains("not today"), "{message}");
        let message = job("sm_1", Precision::F32, &[MAIN, HEADER]).compile(nvrtc).unwrap_err().to_string();
        assert!(message.contains("sm_1"), "{message}");
    }

    #[test]
    fn whatever_decides_the_machine_code_is_in_its_key() {
        let Some(nvrtc) = nvrtc() else { return };
        let (plain, named) = ([MAIN, HEADER], [MAIN, ("other.cuh", HEADER.1)]);
        let mut keys = vec![
            job("sm_80", Precision::F32, &plain).key(nvrtc),
            job("sm_86", Precision::F32, &plain).key(nvrtc),
            job("sm_80", Precision::Tf32, &plain).key(nvrtc),
            job("sm_80", Precision::F32, &named).key(nvrtc),
            job("sm_80", Precision::F32, &[MAIN]).key(nvrtc),
        ];
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 5);
    }

    /// Kernels that spill registers to memory or have a stack, from the log: a line says which one it is about, one after
    /// it what it takes. All kernels there are must have theirs.
    fn spilling(log: &str, n_kernels: usize) -> Vec<String> {
        let clean = |line: &&str| line.contains("spill");
        assert_eq!(log.lines().filter(clean).count(), n_kernels, "a line a kernel:\n{log}");
        let (mut kernel, mut found) = ("", Vec::new());
        for line in log.lines() {
            if line.contains("Compiling entry function") {
                kernel = line.split('\'').nth(1).unwrap_or(line);
            } else if line.contains("spill")
                && !line.contains(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
            {
                found.push(format!("{kernel}: {}", line.trim_start_matches(|c: char| !c.is_ascii_digit())));
            }
        }
        found
    }

    #[test]
    fn the_kernels_compile_without_warnings_spills_or_stack() {
        let Some(nvrtc) = nvrtc() else { return };
        let n_kernels = emulated_grid::kernels(emulated_grid::Variant::F32).len();
        // A card each of the kinds that differ; the others run the same code or one much like it.
        let cards = [(8, 0), (9, 0), (10, 0)].into_iter();
        let cards = cards.filter(|(major, minor)| nvrtc.architectures.contains(&(10 * major + minor)));
        let tell = |card, precision| {
            let architecture = architecture(card, &nvrtc.architectures);
            let log = job(&architecture, precision, SOURCES).compile(nvrtc).unwrap().log;
            let warnings = log.lines().filter(|line| line.to_lowercase().contains("warning")).map(Into::into);
            let all = warnings.chain(spilling(&log, n_kernels));
            all.map(|line| format!("{architecture} {precision:?}: {line}")).collect::<Vec<_>>()
        };
        let found: Vec<String> = std::thread::scope(|scope| {
            let jobs = cards.flat_map(|card| Precision::ALL.map(|precision| (card, precision)));
            let jobs: Vec<_> = jobs.map(|(card, precision)| scope.spawn(move || tell(card, precision))).collect();
            jobs.into_iter().flat_map(|job| job.join().unwrap()).collect()
        });
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}
