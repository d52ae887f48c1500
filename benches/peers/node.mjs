// node node.mjs EVENTS_A_REQUEST URL PAIRS: sends identify and track pairs with Segment's SDK, then waits to be stopped.
import { createHash } from 'node:crypto'
import { Analytics } from '@segment/analytics-node'

const [perRequest, host, pairs] = [Number(process.argv[2]), process.argv[3], Number(process.argv[4])]

// The SDK bounds nothing: without a limit it would hold all the events at once. So requests
// under way are counted, and events made while there are few.
const MAX_REQUESTS = 32
let underWay = 0
let wake = () => {}
const httpClient = async (url, options) => {
  underWay += 1
  try {
    return await fetch(url, options)
  } finally {
    underWay -= 1
    wake()
  }
}

const analytics = new Analytics({ writeKey: 'key-of-the-sdk-0001', host, httpClient, flushAt: perRequest })
analytics.on('error', (error) => {
  console.error(error)
  process.exit(1)
})

const attributes = {
  ageGroup: '25-34',
  favoriteColor: 'ocean blue',
  interests: ['skin care', 'fragrance', 'make-up'],
  newsletterOptIn: true,
  purchaseIntent: 'within three months',
  quizScore: 87,
  result: 'The \u201cNight Owl\u201d: glows best after dark',
  skinType: 'combination',
}

function send(number) {
  const digits = String(number).padStart(16, '0')
  const email = `Person.${digits}@example.com`
  const userId = createHash('sha256').update(email.toLowerCase()).digest('hex')
  const timestamp = new Date(1_790_000_000_123)
  const context = { externalIds: [{ collection: 'users', encoding: 'none', id: userId, type: 'emailSha256Hash' }] }
  analytics.identify({ userId, context, timestamp, traits: { email, emailSha256Hash: userId, ...attributes } })
  analytics.track({
    userId,
    context,
    timestamp,
    event: 'Survey Completed',
    properties: {
      questions: attributes,
      surveyId: 'n3zrik6g',
      surveySessionId: `y2P5ks05${digits}`,
      surveyTitle: 'Find your evening routine',
      trafficSource: 'Owned+Web',
    },
  })
}

console.log('ready')
for (let number = 0; number < pairs; number++) {
  while (underWay >= MAX_REQUESTS) await new Promise((resolve) => { wake = resolve })
  send(number)
  // Lets the SDK's own work run.
  if (number % 50 === 49) await new Promise(setImmediate)
}
await analytics.closeAndFlush()
setInterval(() => {}, 1000)
