use super::*;
use crate::outbox::sqlite::{overlay::Shared, schema};

struct World {
    _directory: tempfile::TempDir,
    connection: Connection,
    shared: Shared,
    ids: Ids,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let database = directory.path().join("relay.db");
        let connection = schema::open_for_writing(directory.path(), &database).expect("a database");
        let shared = Shared::default();
        let ids = Ids::load(&connection, Arc::clone(&shared.recent)).expect("loaded");
        Self {
            _directory: directory,
            connection,
            shared,
            ids,
        }
    }

    /// One transaction that adds keys and forgets others.
    fn write(&mut self, new: &[Place], gone: &[Place]) {
        let transaction = self.connection.transaction().expect("begun");
        let mut rests = Rests::new(&self.shared);
        let added = self.ids.add(&transaction, new, &mut rests);
        added.expect("added");
        for place in gone {
            self.ids.remove(&transaction, *place).expect("removed");
        }
        self.ids.store(&transaction).expect("stored");
        transaction.commit().expect("committed");
        self.ids.committed();
    }

    fn in_memory(&self) -> BTreeSet<Place> {
        let places = self.shared.recent.behind(FIRST, usize::MAX);
        places.into_iter().collect()
    }

    fn indexed(&self) -> BTreeSet<Place> {
        let mut statement = self
            .connection
            .prepare("SELECT key, sequence FROM capture_key")
            .expect("a table");
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
        rows.expect("rows")
            .collect::<Result<_, _>>()
            .expect("places")
    }

    /// The keys in each run.
    fn runs(&self) -> Vec<usize> {
        let mut statement = self
            .connection
            .prepare("SELECT places FROM id_run ORDER BY id")
            .expect("a table");
        let rows = statement.query_map([], |row| Ok(decode(row.get_ref(0)?.as_blob()?).len()));
        rows.expect("rows").collect::<Result<_, _>>().expect("runs")
    }

    /// What the next start has in memory.
    fn after_a_start(&self) -> BTreeSet<Place> {
        let recent = Arc::new(Recent::default());
        Ids::load(&self.connection, Arc::clone(&recent)).expect("loaded");
        recent.behind(FIRST, usize::MAX).into_iter().collect()
    }
}

/// The key of a capture; each third one comes twice.
fn place(sequence: i64) -> Place {
    let key = (sequence - sequence % 3 % 2).wrapping_mul(0x5851_f42d_4c95_7f2d);
    (key, sequence)
}

#[test]
fn each_key_stands_in_memory_or_in_the_index_and_memory_stays_small() {
    const LARGEST: usize = 17;
    let mut world = World::new();
    let mut all = BTreeSet::new();
    let mut next = 0;
    for round in 0..120_i64 {
        let new: Vec<Place> = (next..=next + round % LARGEST as i64).map(place).collect();
        next += new.len() as i64;
        all.extend(new.iter().copied());
        // Old ones, which have left, and such as came of late.
        let gone: Vec<Place> = [next - 200, next - 4, next - 1]
            .into_iter()
            .filter(|_| round % 5 == 4)
            .map(place)
            .filter(|place| all.remove(place))
            .collect();
        world.write(&new, &gone);

        let (memory, indexed) = (world.in_memory(), world.indexed());
        assert!(memory.is_disjoint(&indexed), "{round}");
        assert_eq!(&memory | &indexed, all, "{round}");
        assert!(memory.len() < ROOM + STEP, "{round}: {}", memory.len());
        assert_eq!(world.after_a_start(), memory, "{round}");
        // What has left stays in its run for a lap at the most.
        let written: usize = world.runs().iter().sum();
        assert!(written <= 3 * (ROOM + LARGEST), "{round}: {written}");
        if round % 7 == 6 {
            let recent = Arc::clone(&world.shared.recent);
            world.ids = Ids::load(&world.connection, recent).expect("loaded");
        }
    }
    assert!(world.indexed().len() > 500);
}

#[test]
fn a_key_that_leaves_is_found_in_memory_until_that_is_durable() {
    let mut world = World::new();
    let keys: Vec<Place> = (0..(ROOM + STEP) as i64).map(place).collect();
    let transaction = world.connection.transaction().expect("begun");
    let mut rests = Rests::new(&world.shared);
    let added = world.ids.add(&transaction, &keys, &mut rests);
    added.expect("added");
    world.ids.store(&transaction).expect("stored");
    assert_eq!(world.ids.leaving.len(), STEP);
    assert_eq!(world.shared.recent.len(), keys.len());
    // It fails: what memory knows is asked anew.
    transaction.rollback().expect("rolled back");
    let recent = Arc::clone(&world.shared.recent);
    world.ids = Ids::load(&world.connection, recent).expect("loaded");
    assert_eq!(world.shared.recent.len(), 0);

    world.write(&keys, &[]);
    assert_eq!(world.shared.recent.len(), ROOM);
    assert_eq!(world.indexed().len(), STEP);
}

#[test]
fn small_flushes_share_a_run_until_it_is_full() {
    let mut world = World::new();
    for sequence in 0..RUN_KEYS as i64 + 1 {
        world.write(&[place(sequence)], &[]);
    }
    assert_eq!(world.runs(), [RUN_KEYS, 1]);
    let large: Vec<Place> = (100..100 + 2 * RUN_KEYS as i64).map(place).collect();
    world.write(&large, &[]);
    assert_eq!(world.runs(), [RUN_KEYS, 1, 2 * RUN_KEYS]);
}

#[test]
fn a_forgotten_key_leaves_its_run_and_the_last_one_takes_it_along() {
    let mut world = World::new();
    let keys: Vec<Place> = (0..RUN_KEYS as i64 * 2).map(place).collect();
    let (first, second) = keys.split_at(RUN_KEYS);
    world.write(first, &[]);
    world.write(second, &[]);
    world.write(&[], &first[1..]);
    assert_eq!(world.runs(), [1, RUN_KEYS]);
    world.write(&[], &first[..1]);
    assert_eq!(world.runs(), [RUN_KEYS]);
    assert_eq!(world.after_a_start(), second.iter().copied().collect());
    // Sequences that come again are no trouble.
    world.write(first, &[]);
    world.write(&[], &keys);
    assert!(world.runs().is_empty());
    assert!(world.in_memory().is_empty());
}

#[test]
fn a_key_that_leaves_can_be_forgotten_in_the_same_transaction() {
    let mut world = World::new();
    let keys: Vec<Place> = (0..(ROOM + STEP) as i64).map(place).collect();
    world.write(&keys, &keys);
    assert!(world.in_memory().is_empty());
    assert!(world.indexed().is_empty());
    assert!(world.after_a_start().is_empty());
}

#[test]
fn what_is_written_down_of_a_run_is_read_again() {
    let places = [(i64::MIN, 1), (-1, i64::MAX), (7, 0)];
    let bytes = encode(&places);
    assert_eq!(bytes.len(), places.len() * PLACE_BYTES);
    assert_eq!(decode(&bytes), places);
}
