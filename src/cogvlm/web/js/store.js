// Conversations and their pictures in IndexedDB. Where that is forbidden: in memory, and said so.

let base = null; // IDBDatabase, or null where nothing can be kept
const kept = new Map(); // the stand-in when there is no database

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** True when what is saved will be there after a reload. */
export async function open() {
  try {
    const request = indexedDB.open("cogvlm", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("pictures", { keyPath: "id" });
    };
    base = await done(request);
    base.onversionchange = () => base.close();
    return true;
  } catch {
    return false;
  }
}

const picturesOf = (conversation) => conversation.turns.flatMap((turn) => turn.pictures);

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

/** All conversations, newest first, without the bytes of their pictures. */
export async function list() {
  const all = base ? await done(base.transaction("conversations").objectStore("conversations").getAll()) : [...kept.values()];
  return all.sort((a, b) => b.updated - a.updated);
}

/** One conversation with its pictures' blobs, or null. */
export async function load(id) {
  if (!base) return kept.get(id) ?? null;
  const transaction = base.transaction(["conversations", "pictures"]);
  const conversation = await done(transaction.objectStore("conversations").get(id));
  if (!conversation) return null;
  const pictures = transaction.objectStore("pictures");
  const all = picturesOf(conversation);
  const rows = await Promise.all(all.map((picture) => done(pictures.get(picture.id))));
  all.forEach((picture, i) => { picture.blob = rows[i]?.blob ?? new Blob(); });
  return conversation;
}

/** Writes the conversation; pictures are written once and go when no question has them. */
export async function save(conversation) {
  if (!base) {
    kept.set(conversation.id, conversation);
    return;
  }
  const transaction = base.transaction(["conversations", "pictures"], "readwrite");
  const ended = finished(transaction);
  const conversations = transaction.objectStore("conversations");
  const pictures = transaction.objectStore("pictures");
  const before = await done(conversations.get(conversation.id));
  const old = new Set(before ? picturesOf(before).map((picture) => picture.id) : []);
  for (const { id, blob } of picturesOf(conversation)) {
    if (!old.delete(id)) pictures.put({ id, blob });
  }
  for (const id of old) pictures.delete(id);
  conversations.put({
    ...conversation,
    turns: conversation.turns.map((turn) => ({ ...turn, pictures: turn.pictures.map(({ blob, ...rest }) => rest) })),
  });
  await ended;
}

export async function remove(conversation) {
  if (!base) {
    kept.delete(conversation.id);
    return;
  }
  const transaction = base.transaction(["conversations", "pictures"], "readwrite");
  const ended = finished(transaction);
  transaction.objectStore("conversations").delete(conversation.id);
  for (const { id } of picturesOf(conversation)) transaction.objectStore("pictures").delete(id);
  await ended;
}
