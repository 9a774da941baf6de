import com.google.gson.Gson;
import com.google.protobuf.Struct;
import com.google.protobuf.Value;
import io.grpc.ClientInterceptor;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.stub.MetadataUtils;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import nudged.v1.Content;
import nudged.v1.Delivery;
import nudged.v1.Device;
import nudged.v1.ListDeliveriesRequest;
import nudged.v1.NotifyEventRequest;
import nudged.v1.NotifyEventResponse;
import nudged.v1.PushServiceGrpc;
import nudged.v1.RegisterDeviceRequest;
import nudged.v1.SetOptInRequest;
import nudged.v1.WatchDeliveriesRequest;
import nudged.v1.WatchDeliveriesResponse;

/** A backend in Java: registers a phone, records a choice, reports a comment, follows the push. */
public final class Example {
  private static final String APP = "ifriendspet";
  private static final String USER = "choco-java";

  public static void main(String[] arguments) throws Exception {
    // The retry rule is in a file that every language reads: UNAVAILABLE and RESOURCE_EXHAUSTED are tried again, later
    // when the server says so. Only what is safe to repeat may be retried; the idempotency key makes NotifyEvent so.
    String config = Files.readString(Path.of(env("NUDGED_SERVICE_CONFIG", "../service_config.json")));
    @SuppressWarnings("unchecked")
    Map<String, ?> rules = new Gson().fromJson(config, Map.class);
    ManagedChannel channel =
        ManagedChannelBuilder.forTarget(env("NUDGED_ADDRESS", "127.0.0.1:50051"))
            .usePlaintext()
            .defaultServiceConfig(rules)
            .enableRetry()
            .build();
    try {
      run(PushServiceGrpc.newBlockingStub(channel).withInterceptors(key()));
    } finally {
      channel.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
    }
  }

  private static void run(PushServiceGrpc.PushServiceBlockingStub nudged) throws InterruptedException {
    nudged.registerDevice(
        RegisterDeviceRequest.newBuilder()
            .setAppId(APP)
            .setUserId(USER)
            .setPlatform(Device.Platform.APNS)
            .setToken("d4".repeat(32))
            .setLocale("ko-KR")
            .build());
    nudged.setOptIn(
        SetOptInRequest.newBuilder()
            .setAppId(APP)
            .setUserId(USER)
            .setOptedIn(true)
            .setSource("settings-screen")
            .build());

    // Follow what becomes of events. The first message says that the watch has begun. After a broken stream, open it
    // again with the last message's cursor, and nothing is missed.
    Iterator<WatchDeliveriesResponse> watch =
        nudged
            .withDeadlineAfter(30, TimeUnit.SECONDS)
            .watchDeliveries(
                WatchDeliveriesRequest.newBuilder()
                    .setAppId(APP)
                    .setFilter(WatchDeliveriesRequest.Filter.newBuilder().setUserId(USER))
                    .build());
    watch.next();

    NotifyEventRequest event =
        NotifyEventRequest.newBuilder()
            .setAppId(APP)
            .setEventType("comment.created")
            .setIdempotencyKey("comment-" + UUID.randomUUID())
            .addUserIds(USER)
            .setActorId("bori")
            .setContent(Content.newBuilder().setTitle("New comment").setBody("Bori: so cute!"))
            .setData(Struct.newBuilder().putFields("post", Value.newBuilder().setNumberValue(42).build()))
            .build();
    NotifyEventResponse accepted = nudged.notifyEvent(event);
    NotifyEventResponse again = nudged.notifyEvent(event);
    if (!again.getDuplicate() || !again.getNotificationId().equals(accepted.getNotificationId())) {
      throw new IllegalStateException("a repeat must give the first answer: " + again);
    }

    Delivery told = watch.next().getDelivery();
    while (!told.getNotificationId().equals(accepted.getNotificationId())) {
      told = watch.next().getDelivery();
    }
    System.out.println("java: told of " + told.getState());

    // Or ask.
    ListDeliveriesRequest request =
        ListDeliveriesRequest.newBuilder().setAppId(APP).setNotificationId(accepted.getNotificationId()).build();
    List<Delivery> deliveries = nudged.listDeliveries(request).getDeliveriesList();
    for (Delivery one : deliveries) {
      System.out.printf("java: %s %s %s %s%n", one.getUserId(), one.getState(), one.getReason(), one.getNudgedId());
    }
    if (deliveries.size() != 1 || deliveries.get(0).getState() != Delivery.State.SENT) {
      throw new IllegalStateException("not sent");
    }
  }

  private static ClientInterceptor key() {
    Metadata metadata = new Metadata();
    String key = System.getenv("NUDGED_KEY");
    if (key != null && !key.isEmpty()) {
      metadata.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + key);
    }
    return MetadataUtils.newAttachHeadersInterceptor(metadata);
  }

  private static String env(String name, String otherwise) {
    String value = System.getenv(name);
    return value == null || value.isEmpty() ? otherwise : value;
  }
}
