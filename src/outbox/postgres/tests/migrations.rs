//! A schema of a former version is migrated with what it holds.

use super::{PostgresRig, options};
use crate::outbox::{
    Outbox, PostgresOutbox, SchemaChange,
    conformance::{id, submit_one},
    init,
    postgres::{connect::Connector, schema},
};

#[tokio::test]
async fn a_schema_of_version_1_is_migrated_and_knows_the_integrations_that_were_deleted() {
    let Some(rig) = PostgresRig::new(1) else {
        return;
    };
    let connector = Connector::new(&rig.connection(), 0).expect("valid");
    let connection = connector.get().await.expect("connected");
    let key = rig.vault.seal(schema::INDEX_KEY_PLACE, &[7; 32]);
    schema::migrate_to(&connection, 1, 0, &key.expect("sealed"))
        .await
        .expect("made");
    // One of them has left a capture; of the other there is but its name.
    let rows = "
        INSERT INTO integrations (integration_id) VALUES ('gone'), ('stray');
        INSERT INTO lanes (lane) SELECT key * 8 + n FROM integrations, generate_series(0, 7) AS n;
        INSERT INTO captures (integration, lane, id, digest, mapping_version, accept_millis,
            queue_millis, capture_id, identify, track)
        SELECT key, key * 8, '00000000-0000-0000-0000-000000000001',
            '00000000-0000-0000-0000-000000000002', 1, 1, 1, 'a', '\\x0803', '\\x0803'
        FROM integrations WHERE integration_id = 'gone'";
    connection.batch_execute(rows).await.expect("stored");
    let early = PostgresOutbox::open(&rig.connection(), options(), &rig.vault).await;
    let text = early.err().expect("too old").to_string();
    assert!(text.contains("outbox init"), "{text}");

    let reports = init(&rig.connection(), &rig.vault).await.expect("migrated");
    let to = schema::VERSION;
    assert_eq!(reports[0].change, SchemaChange::Migrated { from: 1, to });
    let outbox = rig.relay().await;
    for (name, last) in [("gone", 1), ("stray", 0)] {
        assert_eq!(outbox.last_incarnation(&id(name)).await, Ok(last), "{name}");
    }
    submit_one(&outbox, "stray", "b").await;
    assert_eq!(outbox.backlog(&id("stray")).await.expect("read").events, 2);
}
