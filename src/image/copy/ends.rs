//! The two ends of a copy, as they are named, opened and refused.

#![forbid(unsafe_code)]

use std::fs::{self, Metadata};
use std::io;
use std::path::Path;
use std::rc::Rc;

use tokio_uring::fs::File;

use crate::engine::nbd;
use crate::image::ImageError;
use crate::image::end::End;
use crate::image::extents::Extents;
use crate::image::nbd::{Export, is_uri};
use crate::image::store::{Kind, Reading, Store, look, same_store};
use crate::image::target::NewFile;

/// Where the copy comes from.
pub(super) enum Source {
    Store(Box<Store>),
    Nbd(Rc<Export>),
}

impl Source {
    pub fn open(path: &Path, reading: Reading) -> Result<Source, ImageError> {
        if is_uri(path) {
            return Ok(Source::Nbd(Rc::new(Export::open(path, true)?)));
        }
        Store::open(path, reading).map(|store| Source::Store(Box::new(store)))
    }

    pub fn path(&self) -> &Path {
        match self {
            Source::Store(store) => &store.path,
            Source::Nbd(export) => &export.uri,
        }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        match self {
            Source::Store(store) => store.size,
            Source::Nbd(export) => export.size,
        }
    }

    pub fn end(&self) -> Result<End, ImageError> {
        match self {
            Source::Store(store) => duplicate(store).map(End::File),
            Source::Nbd(export) => Ok(End::Nbd(export.clone())),
        }
    }

    fn metadata(&self) -> Option<&Metadata> {
        match self {
            Source::Store(store) => Some(&store.metadata),
            Source::Nbd(_) => None,
        }
    }

    /// Where it has data.
    pub fn extents(&self, target: &Target) -> Result<Extents, ImageError> {
        // A second handle for the walk shares the seek position with the first, which the ring's reads do not use.
        let file = match self {
            // Holes may begin and end within a block of the export.
            Source::Store(store) if store.kind == Kind::File && target.block() <= 512 => Some(handle(store)?),
            // An export is not asked for its holes.
            Source::Store(_) | Source::Nbd(_) => None,
        };
        Ok(Extents::new(file, self.size()))
    }

    /// A file or device is looked at when it is opened.
    ///
    /// # Errors
    /// An export of another format.
    pub async fn is_raw(&self) -> Result<(), ImageError> {
        let Source::Nbd(export) = self else { return Ok(()) };
        match export.format().await.map_err(ImageError::system("read from", &export.uri))? {
            None => Ok(()),
            Some(format) => Err(ImageError::Format { path: export.uri.clone(), format }),
        }
    }

    /// The walk would take the missing end of a shrunken file for a hole.
    ///
    /// # Errors
    /// Another size than before.
    pub fn is_unchanged(&self) -> Result<(), ImageError> {
        match self {
            Source::Store(store) if store.kind == Kind::File => {
                match store.file.metadata().is_ok_and(|now| now.len() == store.size) {
                    true => Ok(()),
                    false => Err(ImageError::unsuitable(&store.path, "changed its size while it was copied")),
                }
            }
            _ => Ok(()),
        }
    }
}

/// Where the copy goes.
pub(super) enum Target {
    New(NewFile),
    Device(Store),
    Nbd(Rc<Export>),
}

impl Target {
    /// Every reason to refuse is looked for before anything is made.
    pub fn open(source: &Source, path: &Path, force: bool) -> Result<Target, ImageError> {
        if is_uri(path) {
            return Target::open_export(source, path, force);
        }
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return NewFile::create(path, source.size()).map(Target::New);
            }
            Err(error) => return Err(ImageError::system("look at", path)(error)),
            Ok(_) => {}
        }
        let kind = look(path)?;
        let metadata = fs::metadata(path).map_err(ImageError::system("look at", path))?;
        if source.metadata().is_some_and(|source| same_store(source, &metadata)) {
            return Err(same(source, path));
        }
        if !force {
            return Err(ImageError::Exists(path.to_owned()));
        }
        if kind == Kind::File {
            return NewFile::replace(path, source.size()).map(Target::New);
        }
        let device = Store::open_device(path)?;
        has_room(path, device.size, source)?;
        Ok(Target::Device(device))
    }

    fn open_export(source: &Source, path: &Path, force: bool) -> Result<Target, ImageError> {
        let same_export = |uri: &Path| nbd::is_same(&uri.to_string_lossy(), &path.to_string_lossy());
        if matches!(source, Source::Nbd(export) if same_export(&export.uri)) {
            return Err(same(source, path));
        }
        if !force {
            return Err(ImageError::Exists(path.to_owned()));
        }
        let export = Export::open(path, false)?;
        if export.read_only {
            return Err(ImageError::unsuitable(path, "is read-only"));
        }
        has_room(path, export.size, source)?;
        if !source.size().is_multiple_of(export.block.into()) {
            let (size, block) = (source.size(), export.block);
            let reason = format!(
                "takes whole blocks of {block}, and {} has {size} bytes (truncate --size=%{block} gives a file more)",
                source.path().display()
            );
            return Err(ImageError::unsuitable(path, reason));
        }
        Ok(Target::Nbd(Rc::new(export)))
    }

    /// What is written must be multiples of, as far as the source's holes matter.
    fn block(&self) -> u32 {
        match self {
            Target::New(_) | Target::Device(_) => 512,
            Target::Nbd(export) => export.block,
        }
    }

    pub fn end(&self) -> Result<End, ImageError> {
        match self {
            Target::New(new) => Ok(End::File(File::from_std(new.handle()?))),
            Target::Device(device) => duplicate(device).map(End::File),
            Target::Nbd(export) => Ok(End::Nbd(export.clone())),
        }
    }
}

fn has_room(path: &Path, has: u64, source: &Source) -> Result<(), ImageError> {
    match source.size() {
        needs if needs <= has => Ok(()),
        needs => Err(ImageError::unsuitable(path, format!("has {has} bytes, the image needs {needs}"))),
    }
}

fn same(source: &Source, path: &Path) -> ImageError {
    ImageError::Same { source_path: source.path().to_owned(), destination: path.to_owned() }
}

fn handle(store: &Store) -> Result<fs::File, ImageError> {
    store.file.try_clone().map_err(ImageError::system("open", &store.path))
}

fn duplicate(store: &Store) -> Result<File, ImageError> {
    handle(store).map(File::from_std)
}
