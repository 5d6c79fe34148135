// The `ai` package: an object by a schema, and a turn with a tool. Prints what came of both, as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, tool } from "ai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "wisp", baseURL: url, apiKey: "none", supportsStructuredOutputs: true });
const { object } = await generateObject({
  model: provider(model),
  schema: z.object({ name: z.string(), age: z.number().int() }),
  prompt: "Who?",
  maxRetries: 0,
});
const asked = [];
const { text } = await generateText({
  model: provider(model),
  tools: {
    get_weather: tool({
      description: "The weather in a city.",
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => {
        asked.push(city);
        return "Sunny.";
      },
    }),
  },
  stopWhen: stepCountIs(3),
  prompt: "How is the weather in Paris?",
  maxRetries: 0,
});
console.log(JSON.stringify({ object, text, asked }));
