//! Layers that are tests: how little one takes, and that what stands on some keeps what it was given.

use super::*;
use crate::block::{Geometry, GeometryError, SECTOR};
use crate::engine::Opener;
use crate::engine::config::{PolicyConfig, TopologyConfig};
use crate::engine::driver::{Capabilities, Driver, Open, Summary};
use crate::engine::layer::{self, Layer, Over};
use crate::engine::losses::Losses;
use crate::engine::node::Edge;
use crate::ring::{Io, Ring};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Settings of a layer that shifts its base by some sectors, or (`Pass`) by none.
macro_rules! shift {
    ($config:ident, $name:literal, $kind:ident) => {
        #[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $config {
            pub base: String,
            #[serde(default)]
            pub sectors: u32,
        }

        impl Driver for $config {
            const NAME: &'static str = $name;
            const TARGET: &'static str = "base";
            const HELP: &'static str = "";
            type Store = Over<$kind>;

            fn target(&self) -> String {
                self.base.clone()
            }

            fn check(&self) -> Result<(), (&'static str, String)> {
                Ok(())
            }

            fn examine(&self) -> Result<(), String> {
                Ok(())
            }

            fn summary(&self) -> Summary<'_> {
                let base = Some(self.base.as_str());
                Summary { base, block_size: None, read_only: false, reconnects: false, needs: None }
            }

            fn details(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                Ok(())
            }

            fn opener(&self, name: &str, base: Option<Open>) -> Result<Open, OpenError> {
                let sectors = self.sectors;
                layer::opener(Self::NAME, name, base, move || $kind::new(sectors), AnyStore::$kind)
            }
        }
    };
}

shift!(PassConfig, "pass", Pass);
shift!(OffsetConfig, "offset", Offset);
shift!(HalvesConfig, "halves", Halves);

impl Halves {
    fn new(_: u32) -> Halves {
        Halves
    }
}

impl Pass {
    fn new(_: u32) -> Pass {
        Pass
    }
}

impl Offset {
    fn new(sectors: u32) -> Offset {
        Offset { sectors: sectors.into() }
    }
}

// What a layer takes that changes nothing: begin
pub struct Pass;

#[rustfmt::skip]
impl Layer for Pass {
    fn geometry(&self, below: Geometry) -> Result<Geometry, GeometryError> { Ok(below) }
    fn capabilities(&self, below: Capabilities) -> Capabilities { below }
    fn bytes_below(&self, bytes: u64) -> u64 { bytes }
    fn bytes_above(&self, bytes: u64) -> u64 { bytes }
    fn losses(&self) -> Option<&Losses> { None }
    fn switch(&self, _: bool) -> bool { false }
    fn abandon(&self) {}

    async fn submit<R: Ring>(&self, io: &Io<R>, request: &Request<'_>, below: &Edge<R>) -> Result<(), Errno> {
        below.submit(io, request).await
    }
}
// end

// What one takes that shows its base from some sector on: begin
pub struct Offset {
    sectors: u64,
}

impl Layer for Offset {
    fn geometry(&self, below: Geometry) -> Result<Geometry, GeometryError> {
        let bytes = self.bytes_above(below.bytes());
        Ok(Geometry { capacity: Geometry::new(bytes, below.logical_block)?.capacity, ..below })
    }

    fn capabilities(&self, below: Capabilities) -> Capabilities {
        below
    }

    fn bytes_below(&self, bytes: u64) -> u64 {
        bytes + self.sectors * SECTOR
    }

    fn bytes_above(&self, bytes: u64) -> u64 {
        bytes.saturating_sub(self.sectors * SECTOR)
    }

    fn losses(&self) -> Option<&Losses> {
        None
    }

    fn switch(&self, _: bool) -> bool {
        false
    }

    fn abandon(&self) {}

    async fn submit<R: Ring>(&self, io: &Io<R>, request: &Request<'_>, below: &Edge<R>) -> Result<(), Errno> {
        let sector = if request.op == Op::Flush { 0 } else { request.sector + self.sectors };
        below.submit(io, &Request { sector, ..*request }).await
    }
}
// end

/// Submits two halves of each request at once, and of each half two.
pub struct Halves;

#[rustfmt::skip]
impl Layer for Halves {
    // As a mirror or a stripe would: what one half failed with must not be taken for both.
    fn geometry(&self, below: Geometry) -> Result<Geometry, GeometryError> { Ok(below) }
    fn capabilities(&self, below: Capabilities) -> Capabilities { below }
    fn bytes_below(&self, bytes: u64) -> u64 { bytes }
    fn bytes_above(&self, bytes: u64) -> u64 { bytes }
    fn losses(&self) -> Option<&Losses> { None }
    fn switch(&self, _: bool) -> bool { false }
    fn abandon(&self) {}

    async fn submit<R: Ring>(&self, io: &Io<R>, request: &Request<'_>, below: &Edge<R>) -> Result<(), Errno> {
        let Some((one, other)) = halves(request) else { return below.submit(io, request).await };
        let quarters = async |io: &Io<R>, half: &Request<'_>| match halves(half) {
            None => below.submit(io, half).await,
            Some((one, other)) => {
                let both = io.join(async |io| below.submit(io, &one).await, async |io| below.submit(io, &other).await);
                let (one, other) = both.await;
                one.and(other)
            }
        };
        let (one, other) = io.join(async |io| quarters(io, &one).await, async |io| quarters(io, &other).await).await;
        one.and(other)
    }
}

/// A request in two, on whole blocks of 4 KiB.
fn halves<'a>(request: &Request<'a>) -> Option<(Request<'a>, Request<'a>)> {
    let half = request.sectors / 2 / 8 * 8;
    let splits = request.op != Op::Flush && half > 0;
    splits.then(|| (request.part(0, half), request.part(half, request.sectors - half)))
}

#[test]
fn a_layer_takes_few_lines() {
    let text = include_str!("layers.rs");
    for (name, most) in [("changes nothing", 20), ("from some sector on", 60)] {
        let start = text.find(&format!("{name}: begin")).unwrap();
        let lines = text[start..].lines().skip(1).take_while(|line| *line != "// end").count();
        assert!(lines > 5 && lines < most, "{name}: {lines} lines");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pass,
    Offset,
    Halves,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Pass), Just(Kind::Offset), Just(Kind::Halves)]
}

/// Settings of the volumes that stand one on the other, from the bottom up: each named by its number.
fn volumes(leaf: VolumeConfig, layers: &[(Kind, u32)]) -> (BTreeMap<String, VolumeConfig>, String) {
    let mut volumes = BTreeMap::from([("0".to_owned(), leaf)]);
    for (number, (kind, sectors)) in layers.iter().enumerate() {
        let (base, sectors) = (number.to_string(), *sectors);
        let layer = match kind {
            Kind::Offset => VolumeConfig::Offset(OffsetConfig { base, sectors }),
            Kind::Pass => VolumeConfig::Pass(PassConfig { base, sectors }),
            Kind::Halves => VolumeConfig::Halves(HalvesConfig { base, sectors }),
        };
        volumes.insert((number + 1).to_string(), layer);
    }
    (volumes, layers.len().to_string())
}

fn tree(leaf: VolumeConfig, layers: &[(Kind, u32)]) -> Volume {
    let (volumes, top) = volumes(leaf, layers);
    let opener = Opener::new(&top, &volumes, PolicyConfig::default(), TopologyConfig::default());
    opener.unwrap().open(Duration::MAX).unwrap()
}

fn file(path: &Path) -> VolumeConfig {
    let (direct, read_only, lock, format, block_size) = (false, false, true, None, None);
    VolumeConfig::File(FileConfig { path: path.into(), direct, read_only, lock, format, block_size })
}

/// Bytes that the layers take away in front.
fn shifted(layers: &[(Kind, u32)]) -> usize {
    layers.iter().filter(|(kind, _)| *kind == Kind::Offset).map(|(_, sectors)| *sectors as usize * 512).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// A tree drawn at random is a disk as any other, whatever the store does.
    #[test]
    fn a_tree_keeps_what_it_was_given(
        plan in plan(),
        faults in faults(),
        seed: u64,
        layers in prop::collection::vec((kind(), 0..50u32), 0..5),
        in_memory: bool,
    ) {
        let (front, len) = (shifted(&layers), plan.len() * SHARE * 512);
        let (image, bytes) = image("/tmp", front + len);
        let core = Core::new(SimRing::new(seed, faults));
        if in_memory {
            let size = Size((front + len) as u64);
            let volume = tree(VolumeConfig::Memory(MemoryConfig { size, block_size: None }), &layers);
            let run = Run::new(volume.attach(&core, false), vec![0; len], Faults::default(), true);
            run.run(&core, &plan, |_| {});
        } else {
            let volume = tree(file(image.path()), &layers);
            let run = Run::new(volume.attach(&core, false), bytes[front..].to_vec(), faults, true).after(front);
            run.run(&core, &plan, |ring| calm(ring, None));
        }
    }
}
