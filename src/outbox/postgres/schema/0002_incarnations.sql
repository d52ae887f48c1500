-- Version 2: a deleted integration is remembered as such. What is stored under its key belongs
-- to no later one of its name; that one has the row `name@2`, `name@3` and so on.

ALTER TABLE integrations ADD COLUMN deleted boolean NOT NULL DEFAULT false;

-- Deleted before this version: without a specification, and something was stored under the key.
UPDATE integrations i SET deleted = true
WHERE spec IS NULL AND EXISTS (SELECT 1 FROM captures c WHERE c.integration = i.key);

CREATE INDEX integrations_name ON integrations (split_part(integration_id, '@', 1));
