// A backend in Node: registers a phone, records a choice, reports a comment, follows the push.
// The proto files are read at run time; nothing is generated.
'use strict';

const crypto = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const APP = 'ifriendspet';
const USER = 'choco-node';

const protos = process.env.NUDGED_PROTO_DIR ?? path.join(__dirname, '..', '..', 'proto');
const definition = loader.loadSync('nudged/v1/push_service.proto', {
  includeDirs: [protos],
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true,
});
const { PushService } = grpc.loadPackageDefinition(definition).nudged.v1;

// The retry rule is in a file that every language reads: UNAVAILABLE and RESOURCE_EXHAUSTED are tried again, later when
// the server says so. Only what is safe to repeat may be retried; the idempotency key makes NotifyEvent so.
const serviceConfig = process.env.NUDGED_SERVICE_CONFIG ?? path.join(__dirname, '..', 'service_config.json');
const client = new PushService(process.env.NUDGED_ADDRESS ?? '127.0.0.1:50051', grpc.credentials.createInsecure(), {
  'grpc.service_config': fs.readFileSync(serviceConfig, 'utf8'),
});
const metadata = new grpc.Metadata();
if (process.env.NUDGED_KEY) metadata.set('authorization', `Bearer ${process.env.NUDGED_KEY}`);

function call(method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function main() {
  await call('RegisterDevice', {
    app_id: APP,
    user_id: USER,
    platform: 'APNS',
    token: 'b2'.repeat(32),
    locale: 'ko-KR',
  });
  await call('SetOptIn', { app_id: APP, user_id: USER, opted_in: true, source: 'settings-screen' });

  // Follow what becomes of events. The first message says that the watch has begun. After a broken stream, open it again
  // with the last message's cursor, and nothing is missed.
  const watch = client.WatchDeliveries({ app_id: APP, filter: { user_id: USER } }, metadata, {
    deadline: Date.now() + 30_000,
  });
  const told = watch[Symbol.asyncIterator]();
  await told.next();

  const event = {
    app_id: APP,
    event_type: 'comment.created',
    idempotency_key: `comment-${crypto.randomUUID()}`,
    user_ids: [USER],
    actor_id: 'bori',
    content: { title: 'New comment', body: 'Bori: so cute!' },
    data: { fields: { post: { numberValue: 42 } } },
  };
  const accepted = await call('NotifyEvent', event);
  const again = await call('NotifyEvent', event);
  if (!again.duplicate || again.notification_id !== accepted.notification_id) {
    throw new Error('a repeat must give the first answer');
  }

  for (;;) {
    const { value: message, done } = await told.next();
    if (done) throw new Error('the watch ended');
    if (message.delivery?.notification_id === accepted.notification_id) {
      console.log(`node: told of ${message.delivery.state}`);
      break;
    }
  }
  watch.cancel();

  // Or ask.
  const { deliveries } = await call('ListDeliveries', { app_id: APP, notification_id: accepted.notification_id });
  for (const one of deliveries) console.log(`node: ${one.user_id} ${one.state} ${one.reason} ${one.nudged_id}`);
  if (deliveries.length !== 1 || deliveries[0].state !== 'SENT') throw new Error('not sent');
}

main()
  .catch((error) => {
    console.error(`node: ${error.message}`);
    process.exitCode = 1;
  })
  .finally(() => client.close());
