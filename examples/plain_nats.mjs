// A job over plain NATS from JavaScript: npm install @nats-io/transport-node @nats-io/jetstream @msgpack/msgpack
//
//     node examples/plain_nats.mjs nats://127.0.0.1:4222 MODEL "What is AI?"
import { randomUUID } from "node:crypto";
import { connect } from "@nats-io/transport-node";
import { jetstream } from "@nats-io/jetstream";
import { decode, encode } from "@msgpack/msgpack";

const [url, model, prompt] = process.argv.slice(2);
const origin = `example-${randomUUID()}`, jobId = randomUUID();
const nc = await connect({ servers: url });
const frames = nc.subscribe(`live.${origin}.>`); // before the job is published: no frame can be missed
const finals = nc.subscribe(`results.${jobId}`, { max: 1 });
const job = { v: 1, job_id: jobId, origin, model, klass: "normal", text: prompt, params: { max_new_tokens: 24 }, created_ms: Date.now() };
const ack = await jetstream(nc).publish(`jobs.${model}.normal.any`, encode(job), { msgID: jobId });
console.error(`accepted as number ${ack.seq} of the queue`);

let shown = 0;
reading: for await (const message of frames) {
  for (const [runJob, , first, , , texts, end] of decode(message.data).runs ?? []) {
    if (runJob !== jobId || first > shown) continue;
    process.stdout.write(texts.slice(shown - first).join("")); // a worker that took over may repeat what was shown
    shown = Math.max(shown, first + texts.length);
    if (end) break reading;
  }
}
for await (const message of finals) {
  const record = decode(message.data);
  console.error(`\n${record.reason}: ${record.token_ids.length / 4} tokens by ${record.workers.join(", ")}`);
}
await nc.close();
